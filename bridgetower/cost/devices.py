"""What is known of accelerators by their names, and what a process uses."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """An accelerator as its maker's data sheet describes it."""

    cuda_name: str
    """Part of the name that CUDA gives."""
    memory_gb: float
    """In 10^9 bytes, as the sheet says; of those with 80 GB CUDA shows 85."""
    bf16_flops: float
    """Dense operations a second in bfloat16."""
    fp32_flops: float
    """In float32 without TF32."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the other GPUs of the node, one way: half of the sheet's NVLink; of PCIe where NVLink joins pairs or none."""
    power_watts: float
    """Of the board, at most."""
    server_watts: float
    """A GPU's share of a full server, at most; 0: no server of the maker's own."""
    mfu: float
    """What part of bf16_flops a step is assumed to reach; docs/plan.md says why."""
    source: str


# A longer CUDA name goes before its beginning.
DEVICES: Mapping[str, Device] = {
    "h100-pcie": Device(
        "H100 PCIe", 80, 756e12, 51e12, 2.0e12, 64e9, 350, 0, 0.30, "NVIDIA H100 data sheet (PCIe), PCIe 5 x16"
    ),
    "h100-nvl": Device(
        "H100 NVL", 94, 835e12, 60e12, 3.9e12, 64e9, 400, 0, 0.35, "NVIDIA H100 data sheet (NVL), PCIe 5 x16"
    ),
    "h100": Device(
        "H100", 80, 989e12, 67e12, 3.35e12, 450e9, 700, 10_200 / 8, 0.34, "NVIDIA H100 (SXM) and DGX H100 data sheets"
    ),
    "h200": Device(
        "H200", 141, 989e12, 67e12, 4.8e12, 450e9, 700, 10_200 / 8, 0.34, "NVIDIA H200 (SXM) and DGX H200 data sheets"
    ),
    "b200": Device("B200", 180, 2250e12, 75e12, 8.0e12, 900e9, 1000, 14_300 / 8, 0.35, "NVIDIA DGX B200 data sheet"),
    "a100-40g": Device(
        "A100-SXM4-40GB", 40, 312e12, 19.5e12, 1.555e12, 300e9, 400, 6_500 / 8, 0.40, "NVIDIA A100 and DGX A100 sheets"
    ),
    "a100-80g": Device(
        "A100", 80, 312e12, 19.5e12, 2.039e12, 300e9, 400, 6_500 / 8, 0.45, "NVIDIA A100 and DGX A100 data sheets"
    ),
    "l40s": Device("L40S", 48, 362e12, 91.6e12, 0.864e12, 32e9, 350, 0, 0.25, "NVIDIA L40S data sheet, PCIe 4 x16"),
}
"""By the name that a command line takes."""


def peak_flops(device_type: str) -> float | None:
    """Dense bf16 operations a second of the device at hand; None where that is not known.

    Args:
        device_type: cuda or cpu.
    """
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    return next((device.bf16_flops for device in DEVICES.values() if device.cuda_name in name), None)


def host_memory_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
