"""Peak speed, memory and power of accelerators, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """An accelerator, as its maker's data sheet describes it."""

    cuda_name: str
    """Part of the name that CUDA reports."""
    memory_gb: float
    """Memory in 10^9 bytes, as the sheet says; CUDA reports 85 for those with 80."""
    bf16_flops: float
    """Peak of dense operations per second in bfloat16."""
    fp32_flops: float
    """Peak operations per second in float32, without TF32."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Speed of the link to the other GPUs of the node, one way: half of the sheet's NVLink; that of PCIe where NVLink
    joins pairs of GPUs or none."""
    power_watts: float
    """Maximal power of the board."""
    server_watts: float
    """Maximal power of the maker's server, per GPU; 0: the maker sells none."""
    mfu: float
    """Fraction of bf16_flops that a step is assumed to reach; docs/plan.md says why."""
    source: str


# The first match wins, so a CUDA name stands before the names that it begins with.
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
"""Devices by the name that --gpu takes."""


def peak_flops(device_type: str) -> float | None:
    """Return the peak bf16 operations per second of the present device; None where they are not known.

    Args:
        device_type: cuda or cpu.
    """
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    return next((device.bf16_flops for device in DEVICES.values() if device.cuda_name in name), None)
