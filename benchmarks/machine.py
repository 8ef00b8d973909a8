"""The CPU that a benchmark was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
# Features that decide how fast matmuls are in float32, and whether bfloat16 is computed or emulated.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "svebf16")


def cpu_model() -> str:
    """Return the CPU's product name, or its architecture if the system does not tell."""
    return _read_field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the names of the CPU's vector and matrix units that matter; empty if the system does not tell."""
    features = (_read_field("flags") or _read_field("Features")).split()
    return [feature for feature in _FEATURES if feature in features]


def _read_field(name: str) -> str:
    """Return a field of /proc/cpuinfo for the first core; empty if there is none."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, "")
