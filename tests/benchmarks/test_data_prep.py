"""benchmarks/data_prep.py: the content of its results, measured on one photograph of each size."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import cpu_model
from tests.conftest import run_script

BENCHMARK = "benchmarks/data_prep.py"
PROGRAM = shutil.which("img2dataset")
HAS_PHOTOS = importlib.util.find_spec("skimage") is not None
needs_photos = pytest.mark.skipif(not HAS_PHOTOS, reason="the photographs are part of scikit-image")


def measure(tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Run the benchmark and return the content of its file."""
    out = tmp_path / "results.json"
    run_script(BENCHMARK, "--images=1", "--rounds=1", f"--out={out}", *flags)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@needs_photos
def test_the_results_name_the_machine_and_all_versions(tmp_path):
    content = measure(tmp_path)
    assert content["machine"] == cpu_model() and content["cores"] >= 1
    assert all(content[name] for name in ("python", "opencv", "pillow", "numpy", "simplejpeg", "commit"))
    assert content["img2dataset"] is None
    for operations in content["images_per_second_and_core"].values():
        assert {name: list(sides) for name, sides in operations.items()} == {"resize": ["ours"], "copy": ["ours"]}


@needs_photos
@pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not on the PATH")
def test_results_beside_img2dataset_name_its_version(tmp_path):
    content = measure(tmp_path, f"--img2dataset_python={Path(str(PROGRAM)).with_name('python')}")
    assert content["img2dataset"]["version"].startswith("1.") and content["img2dataset"]["opencv"]
    for operations in content["images_per_second_and_core"].values():
        assert all(sides.keys() == {"ours", "img2dataset"} for sides in operations.values())


@pytest.mark.parametrize(
    ("python", "message"), [("/nowhere", "/nowhere cannot be run"), ("false", "false cannot run its")]
)
def test_a_python_without_img2dataset_is_refused_before_anything_is_measured(tmp_path, python, message):
    result = run_script(BENCHMARK, f"--img2dataset_python={python}", f"--out={tmp_path / 'x.json'}", code=2)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "x.json").exists()


def test_the_cpu_has_the_name_that_the_system_reports():
    info = Path("/proc/cpuinfo")
    if info.is_file() and "model name" in info.read_text():
        assert f": {cpu_model()}\n" in info.read_text()
    assert cpu_model()
