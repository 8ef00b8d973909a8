"""Preparing data needs no torch: each worker would spend seconds and 300 MB on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO

MODULES = [
    ".".join(path.relative_to(REPO).with_suffix("").parts)
    for path in sorted((REPO / "data_prep").rglob("*.py"))
    if path.name != "__init__.py"
]
BLOCKED = "import sys; sys.modules['torch'] = None; "


def test_all_modules_are_tried():
    assert {"data_prep.build_shards", "data_prep.check_shards", "data_prep.sources.vqav2"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported_where_torch_cannot(module):
    subprocess.run([sys.executable, "-c", f"{BLOCKED}import {module}"], cwd=REPO, check=True)


def test_shards_are_built_and_checked_where_torch_cannot_be_imported(tmp_path):
    code = f"""{BLOCKED}
from PIL import Image
from data_prep import build_shards, check_shards
Image.new("RGB", (40, 30), "red").save("red.png")
open("c.csv", "w").write("image,caption\\nred.png,red")
build_shards.main("folder", raw=".", captions="c.csv", out="out", workers="1")
check_shards.main("out", decode="all", workers="1")
"""
    environment = {"PYTHONPATH": str(REPO)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "1 captions: nothing wrong" in found.stdout
