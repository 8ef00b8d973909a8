"""Which implementation of the operations a model gets."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
from torch import nn

from bridgetower.kernels.cpu_ops import CpuOps, has_matrix_units
from bridgetower.kernels.flash_ops import FlashOps, is_ampere_or_later
from bridgetower.kernels.ops import Ops
from bridgetower.kernels.torch_ops import TorchOps


def choose_ops(device: torch.device | None = None, *, fuse_kernels: bool = True, compiled: bool = False) -> Ops:
    """Return the fastest operations for a device; called once, when a model is built.

    Args:
        device: where the model will compute; None: a GPU if there is one, else the CPU.
        fuse_kernels: use our own Triton kernels where they run (``compute.fuse_kernels``).
        compiled: compile what stands between attention kernels (``compute.compile``).
    """
    if device is None:
        device = torch.get_default_device()  # the meta device while shapes alone are built
        if device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
    ops = _eager_ops(device, fuse_kernels=fuse_kernels)
    if not compiled:
        return ops
    from bridgetower.kernels.compiled_ops import CompiledOps  # torch._dynamo takes a second to import

    return CompiledOps(ops)


def _eager_ops(device: torch.device, *, fuse_kernels: bool) -> TorchOps:
    if device.type == "cpu":
        return CpuOps(has_matrix_units=has_matrix_units())
    if device.type != "cuda" or not is_ampere_or_later(device):
        return TorchOps()
    if fuse_kernels and _builds_triton_kernels(device):
        from bridgetower.kernels.triton.ops import TritonOps  # not every build of torch brings Triton

        return TritonOps()
    return FlashOps()


@lru_cache
def _builds_triton_kernels(device: torch.device) -> bool:
    """Build and launch one kernel; what fails is said once, and torch's operators are used instead."""
    if importlib.util.find_spec("triton") is None:
        return False
    from bridgetower.kernels.triton import functions

    try:
        with torch.cuda.device(device):
            functions.norm(torch.zeros(1, 16, device=device), nn.LayerNorm(16, device=device))
    except Exception as error:  # Triton has many, e.g. where there is no C compiler for what launches its kernels
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        warnings.warn(
            f"Triton kernels cannot be built, so torch's operators, which are slower, are used instead: "
            f"{type(error).__name__}: {first_line}. Triton needs a C compiler (Debian: gcc and python3-dev).",
            stacklevel=2,
        )
        return False
    return True
