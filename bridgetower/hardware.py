"""What is known of accelerators by their names."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

# Dense bf16 operations a second, from NVIDIA's data sheets; a longer name goes before its beginning.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_type: str) -> float | None:
    """Dense bf16 operations a second of the device at hand; None where that is not known.

    Args:
        device_type: cuda or cpu.
    """
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def host_memory_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
