"""Peaks by the names that CUDA gives."""

from __future__ import annotations

import pytest
import torch

from bridgetower.hardware import peak_flops


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
def test_peak_by_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("cuda") == teraflops * 1e12


def test_peak_of_the_unknown_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    assert peak_flops("cuda") is None and peak_flops("cpu") is None
