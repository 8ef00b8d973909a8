"""Figures of accelerators, and their peaks by the names that CUDA reports."""

from __future__ import annotations

import pytest
import torch

from bridgetower.cost.devices import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_follows_from_the_name_that_cuda_reports(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("cuda") == teraflops * 1e12


def test_peak_of_an_unknown_device_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    assert peak_flops("cuda") is None and peak_flops("cpu") is None


def test_devices_are_ordered_so_that_the_longest_name_is_found_first():
    names = [device.cuda_name for device in DEVICES.values()]
    for index, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:index])


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_device_has_plausible_figures(device):
    assert 1e14 < device.bf16_flops < 1e16 and device.fp32_flops < device.bf16_flops
    assert 5e11 < device.memory_bytes_per_second < 1e13 and 24 <= device.memory_gb <= 300
    assert 0 < device.mfu < 1 and 200 <= device.power_watts <= 1500 and device.source
