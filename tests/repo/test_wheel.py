"""What an installed package holds, when the repository is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGES = ("bridgetower", "pretrain", "finetune", "data_prep", "benchmarks")
# Beside the code, and shown to people on their way through the repository.
FOR_READERS = (".md", ".json")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of a wheel that was built from the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (REPO / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_holds_the_code_the_vocabularies_and_the_template(installed):
    source = installed.parent / "source"
    expected = {path.relative_to(source) for name in PACKAGES for path in (source / name).rglob("*") if path.is_file()}
    expected = {path for path in expected if path.parts[0] != "benchmarks" or path.suffix not in FOR_READERS}
    assert {path for path in expected if not (installed / path).is_file()} == set()
    assert len([path for path in expected if path.match("bridgetower/data/assets/*/*")]) == 4


def test_the_vocabularies_of_a_wheel_need_no_hub_and_no_repository(installed, tmp_path):
    code = (
        "import bridgetower.data.text as t; print(t.__file__);"
        "print([t.Tokenizer(n).encode(['Hello world!'], 50)[0].tolist() for n in ('roberta', 'emoji')])"
    )
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    file, ids = done.stdout.splitlines()
    assert file == str(installed / "bridgetower/data/text.py") and ids.startswith("[[0, 31414, 232, 328, 2], [0, ")
