"""Compile every Triton kernel of the model for compute capability 9.0 (H100); this needs no GPU.

python -m tests.compile_kernels

Prints, as JSON, how many bytes of registers each thread of each kernel spills to local memory (base model, bfloat16).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bridgetower.kernels.triton import layer_kernels as kernels
from bridgetower.kernels.triton import row_attention, row_attention_kernels
from bridgetower.kernels.triton import short_attention_kernels as attention_kernels

WIDTH, HEADS = 768, 12
NORM = {"WIDTH": WIDTH, "BLOCK": 1024, "SHIFTS": True, "DROPS": True, "num_warps": 1}
TILE = {"ROWS": 16, "COLUMNS": 128}
TAKEN = {"WIDTH": WIDTH, "BLOCK": 1024, "POSITIONS": 4}
ATTENTION = {"QUERY_STRIDE": 3 * WIDTH, "KEY_STRIDE": 3 * WIDTH, "VALUE_STRIDE": 3 * WIDTH}
ATTENTION |= {"HEADS": HEADS, "WIDTH": WIDTH // HEADS, "DROPS": True}
ROWS = {"STRIDE": 3 * WIDTH, "HEADS": HEADS, "WIDTH": WIDTH // HEADS}
CONSTANTS: dict[Any, dict[str, Any]] = {
    kernels.norm_forward: {**NORM, "ADDS": True},
    kernels.norm_backward: {**NORM, "HAS_TOTAL_GRAD": True},
    kernels.activation_forward: {"WIDTH": 4 * WIDTH, **TILE, "IS_QUICK": False},
    kernels.activation_backward: {"WIDTH": 4 * WIDTH, **TILE, "IS_QUICK": False},
    kernels.join: {"WIDTH": WIDTH, **TILE, "PARTS": 3},
    kernels.take_forward: TAKEN,
    kernels.take_backward: TAKEN,
    attention_kernels.few_keys_forward: {**ATTENTION, "QUERIES": 64, "KEYS": 32},
    attention_kernels.few_keys_backward: {**ATTENTION, "QUERIES": 64, "KEYS": 32},
    attention_kernels.few_queries_forward: {**ATTENTION, "QUERIES": 32, "KEYS": 64},
    attention_kernels.few_queries_backward: {**ATTENTION, "QUERIES": 32, "KEYS": 64},
    row_attention_kernels.rows_forward: {**ROWS, **row_attention.FORWARD},
    row_attention_kernels.rows_backward_of_queries: {**ROWS, **row_attention.BACKWARD_OF_QUERIES},
    row_attention_kernels.rows_backward_of_keys: {**ROWS, **row_attention.BACKWARD_OF_KEYS},
}
TYPES = {
    **dict.fromkeys(("mean", "inverse", "partial", "log_sum", "along_sum"), "*fp32"),
    **dict.fromkeys(("query_start", "key_start"), "*i32"),
    **dict.fromkeys(("index", "order", "start"), "*i64"),
    **dict.fromkeys(("num_rows", "num_positions", "row_stride", "position_stride", "threshold", "length"), "i32"),
    **dict.fromkeys(("epsilon", "left", "scale", "score_scale"), "fp32"),
    **{"key_word": "*i64", "key_number": "i64"},
}


def spilled_bytes(kernel: Any, constants: dict[str, Any]) -> int:
    """Compile a kernel. Returns: bytes that it spills to memory and loads again because registers run out."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [str(ptxas), "--gpu-name=sm_90a", "-v", str(ptx), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills is not None, report
    return int(spills[1]) + int(spills[2])


if __name__ == "__main__":
    spilled = {kernel.__name__: spilled_bytes(kernel, constants) for kernel, constants in CONSTANTS.items()}
    sys.stdout.write(json.dumps(spilled))
