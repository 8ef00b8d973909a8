"""Runs one section of benchmarks/gpu/measure.py, in a process of its own.

python -m benchmarks.gpu.sections REQUEST.json RESULT.json

Each row is written as soon as it is measured, so that nothing is lost if the process dies. Importing this module leaves
CUDA alone: the processes are forked from one that has imported it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import pipeline
from benchmarks.gpu.agreement import measure_agreement
from benchmarks.gpu.engine import measure_engine
from benchmarks.gpu.plan import Request, read_request
from benchmarks.gpu.steps import measure_sides, measure_steps
from benchmarks.gpu.timing import Note, Row, clock
from benchmarks.step import describe_machine
from bridgetower.cost.devices import peak_flops
from bridgetower.engine.launch import prepare_process, read_launch
from bridgetower.io.files import write_atomically

_PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "transformers", "timm", "open_clip_torch", "webdataset")


def serve(request_path: Path, result_path: Path) -> None:
    """Measure a section, and write its rows and its error, if there is one, to ``result_path``."""
    request = read_request(request_path)
    if request.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda._is_in_bad_fork():
        # A library touched CUDA when it was imported, so that a fork cannot use it: start a new interpreter.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.sections", str(request_path), str(result_path)])
    result: dict[str, Any] = {"rows": [], "error": ""}

    def note(row: Row) -> None:
        result["rows"].append(row)
        write_atomically(result_path, json.dumps(result).encode())

    if request.measure != "pipeline":  # which starts pretrain/train.py, and leaves the GPU's memory to it
        prepare_process(read_launch({}), 1 if request.small else 0)
    try:
        MEASURES[request.measure](request, note)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    write_atomically(result_path, json.dumps(result).encode())


def measure_machine(request: Request, note: Note) -> None:
    """Note device and versions, and the best rate of the device's matrix units and of its memory."""
    device, size = torch.device(request.device), 256 if request.small else 8192
    torch.manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / clock(lambda: left @ right, device, request)["seconds"]
    source = torch.empty(size * size * 16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / clock(lambda: target.copy_(source), device, request)["seconds"]
    peak, machine = peak_flops(request.device), describe_machine(request.device)
    note(
        {
            "what": machine["device"],
            **machine,
            "versions": {name: _version(name) for name in _PACKAGES},
            "has_nvcc": shutil.which("nvcc") is not None,
            "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None,
            "peak_tflops": peak / 1e12 if peak else None,
            "product_tflops": matmul / 1e12,
            "copy_gb_per_second": copy / 1e9,
            "note": f"bf16 matmuls {matmul / 1e12:,.0f} TFLOP/s, copies {copy / 1e9:,.0f} GB/s",
        }
    )


def measure_pipeline(request: Request, note: Note) -> None:
    """Time training runs over photographs that are decoded on the way, and how long their steps wait for data."""
    pipeline.measure(request, note)


MEASURES: Mapping[str, Callable[[Request, Note], None]] = {
    "machine": measure_machine,
    "agreement": measure_agreement,
    "steps": measure_steps,
    "sides": measure_sides,
    "engine": measure_engine,
    "pipeline": measure_pipeline,
}


def _version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
