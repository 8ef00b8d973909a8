"""Images per second per core of this project's conversion and of img2dataset's resizer, on the same photographs.

python benchmarks/data_prep.py [--img2dataset_python=PYTHON] [--images=48] [--rounds=5] [--out=FILE.json]

img2dataset pins versions that conflict with this project's, so it runs under a Python of its own (`python3 -m venv ENV
&& ENV/bin/pip install img2dataset`; give --img2dataset_python=ENV/bin/python). Both sides take turns in one run. The
best round of each counts, in CPU seconds of one thread.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import fire
import numpy as np
import PIL
import simplejpeg
from fire.decorators import SetParseFn
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_features, cpu_model
from benchmarks.photos import SIZES, cut_photos
from bridgetower.config.cli import parse_whole, refuse_unknown, run_command
from bridgetower.config.snapshot import find_commit
from bridgetower.errors import ConfigError

_FLAGS = {
    "img2dataset_python": "a python that can import img2dataset (default: measure only this project)",
    "images": "number of photographs of each size (default 48)",
    "rounds": "number of turns of each side (default 5)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/data_prep.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
_SHORT_SIDE_PX = 304
# Each side runs under its own Python with the folder of photographs, and prints the seconds of each operation: the best
# of three passes.
_TIMING = """
import json, sys, time
from pathlib import Path
images = [file.read_bytes() for file in sorted(Path(sys.argv[1]).glob("*.jpg"))]
def best(function):
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for raw in images:
            assert len(function(raw)) > 1000
        seconds.append(time.process_time() - start)
    return min(seconds)
"""
_OURS = f"""
from data_prep.convert import convert
from data_prep.record import ImagePolicy
def run(short_side_px):
    policy = ImagePolicy(short_side_px=short_side_px)
    return best(lambda raw: convert(raw, policy, "x").content)
print(json.dumps({{"resize": run({_SHORT_SIDE_PX}), "copy": run(0)}}))
"""
_THEIRS = f"""
import io, cv2
cv2.setNumThreads(1)
from img2dataset.resizer import Resizer
def run(**options):
    resizer = Resizer(image_size={_SHORT_SIDE_PX}, encode_quality=95, **options)
    def resize(raw):
        content, *_, error = resizer(io.BytesIO(raw))
        assert error is None, error
        return content
    return best(resize)
resize = run(resize_mode="keep_ratio", resize_only_if_bigger=True)
print(json.dumps({{"resize": resize, "copy": run(resize_mode="no", resize_only_if_bigger=False, skip_reencode=True)}}))
"""
_THEIR_VERSIONS = """
import importlib.metadata, json, platform, cv2
versions = {"version": importlib.metadata.version("img2dataset"), "python": platform.python_version()}
print(json.dumps({**versions, "opencv": cv2.__version__}))
"""


def main(
    *unexpected: str,
    img2dataset_python: str = "",
    images: str = "48",
    rounds: str = "5",
    out: str = "",
    **unknown: str,
) -> None:
    """Measure and print a table."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    count, turns = parse_whole("images", images, 1), parse_whole("rounds", rounds, 1)
    sides = {"ours": (sys.executable, _OURS)}
    if img2dataset_python:
        sides["img2dataset"] = (img2dataset_python, _THEIRS)
    theirs = json.loads(_run(img2dataset_python, _THEIR_VERSIONS)) if img2dataset_python else None
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            for index, raw in enumerate(cut_photos(size, count)):
                (Path(folder) / f"{index:04d}.jpg").write_bytes(raw)
            rates[name] = _measure(sides, folder, count, turns)
    _print(rates)
    if out:
        content = {
            "images_per_second_and_core": rates,
            "short_side_px": _SHORT_SIDE_PX,
            **_machine(),
            "img2dataset": theirs,
        }
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def _measure(sides: dict[str, tuple[str, str]], folder: str, count: int, turns: int) -> dict[str, dict[str, float]]:
    """Return images per second by operation and side, the best of several turns."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(turns):
        for side, (python, code) in sides.items():
            for operation, seconds in json.loads(_run(python, _TIMING + code, folder)).items():
                rate = best.setdefault(operation, {})
                rate[side] = max(rate.get(side, 0.0), count / seconds)
    return best


def _run(python: str, code: str, *arguments: str) -> str:
    """Run code under a Python, and return the last line that it prints."""
    try:
        result = subprocess.run(
            [python, "-W", "ignore", "-c", code, *arguments],
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise ConfigError(f"{python} cannot be run ({error.strerror}). Give the path of a python.") from error
    if result.returncode:
        raise ConfigError(
            f"{python} cannot run its side of the benchmark. Install what the error names:\n{result.stderr[-2000:]}"
        )
    return result.stdout.splitlines()[-1]


def _print(rates: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table(title=f"Images per second per core (resize: short side {_SHORT_SIDE_PX} px)", title_justify="left")
    for name in ("photographs", "operation", "ours", "img2dataset", "ratio"):
        table.add_column(name, justify="left" if name in ("photographs", "operation") else "right")
    for size, operations in rates.items():
        for operation, rate in operations.items():
            theirs = rate.get("img2dataset")
            ratio = f"{rate['ours'] / theirs:.2f}" if theirs else "-"
            table.add_row(size, operation, f"{rate['ours']:,.0f}", f"{theirs:,.0f}" if theirs else "-", ratio)
    Console().print(table)


def _machine() -> dict[str, Any]:
    """Return the machine and the versions that the figures belong to."""
    versions = {"opencv": cv2.__version__, "pillow": PIL.__version__, "numpy": np.__version__}
    return {
        "machine": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "simplejpeg": getattr(simplejpeg, "__version__", ""),
        "commit": find_commit(),
    }


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
