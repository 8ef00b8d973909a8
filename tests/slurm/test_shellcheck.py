"""shellcheck finds no fault in any shell script of the repository."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import REPO
from tests.slurm.cluster import install

SCRIPTS = [*sorted((REPO / "slurm").glob("*.sh")), REPO / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    install()
    process = subprocess.run(
        ["shellcheck", "--external-sources", script.relative_to(REPO)], cwd=REPO, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout
