"""What a benchmark of the CPU was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
# What decides how fast matrix products are in float32, and whether bfloat16 is computed or emulated.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "svebf16")


def cpu_model() -> str:
    """The name of the CPU as its maker sells it, or of its architecture where the system does not tell."""
    return _told("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of the vector and matrix units that matter the CPU has, by the system's names; none if it does not tell."""
    told = (_told("flags") or _told("Features")).split()
    return [feature for feature in _FEATURES if feature in told]


def _told(name: str) -> str:
    """A line of /proc/cpuinfo, of the first core."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, "")
