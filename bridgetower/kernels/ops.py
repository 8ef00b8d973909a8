"""What stands between the products of a layer: residual sums with dropout and norm, and activations.

On an NVIDIA GPU each is one kernel (``bridgetower.kernels.triton.functions``): it reads its inputs once, and gives the
gradients of biases and of the norm's weights on the way, for which torch's operators read everything again. Elsewhere
they are torch's operators.

``kernels`` says whether kernels may be used. Shapes: D width, E width inside a feed-forward, N shared rows, R rows that
read them, P positions.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.kernels.dropout import drop

_WIDEST = 4096


def fits(states: Tensor) -> bool:
    """Whether the kernels take such states; compiled code has its own.

    They are launched on the current device, and do not know autocast, under which products have another type.
    """
    return (
        states.is_cuda
        and states.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and states.shape[-1] <= _WIDEST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
        and states.device.index == torch.cuda.current_device()
        and _has_kernels(states.device)
    )


@lru_cache
def is_ampere_or_later(device: torch.device) -> bool:
    """Whether a GPU is NVIDIA's and has matrix units for bfloat16."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _has_kernels(device: torch.device) -> bool:
    if not is_ampere_or_later(device) or importlib.util.find_spec("triton") is None:
        return False
    try:
        _kernels().norm(torch.zeros(1, 16, device=device), nn.LayerNorm(16, device=device))
    except Exception as error:  # Triton has many, e.g. where there is no C compiler for what starts its kernels
        said = (str(error).strip().splitlines() or [""])[0][:200]
        warnings.warn(
            f"Kernels cannot be built, and torch's operators, which are slower, are used instead: "
            f"{type(error).__name__}: {said}. Triton needs a C compiler (Debian: gcc and python3-dev).",
            stacklevel=2,
        )
        return False
    return True


def _takes(layer: nn.Module) -> bool:
    """Whether a norm is one: some towers have nothing in its place."""
    return isinstance(layer, nn.LayerNorm) and layer.elementwise_affine and layer.bias is not None


def _kernels() -> Any:
    """Imported where there is Triton alone, which not every build of torch brings along."""
    return importlib.import_module("bridgetower.kernels.triton.functions")


def norm(states: Tensor, layer: nn.Module, *, kernels: bool) -> tuple[Tensor, Tensor]:
    """X and LN(x), shape (..., D): who reads both reads them from here, and their gradients are added on the way."""
    if kernels and _takes(layer) and fits(states):
        return _kernels().norm(states, layer)  # type: ignore[no-any-return]
    return states, layer(states)


def add_norm(states: Tensor, update: Tensor, layer: nn.LayerNorm, *, kernels: bool) -> Tensor:
    """LN(x + u), shape (..., D)."""
    if kernels and fits(states):
        return _kernels().add_norm(states, update, layer)  # type: ignore[no-any-return]
    result: Tensor = layer(states + update)
    return result


def project_add_norm(
    states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.LayerNorm, dropout: float, *, kernels: bool
) -> tuple[Tensor, Tensor]:
    """X + Dropout(W h + b), and LN of that.

    Args:
        states: x, shape (..., D).
        inner: h.
        dropout: 0 when not training.
    """
    if kernels and _takes(layer) and fits(states):
        found: tuple[Tensor, Tensor] = _kernels().project_add_norm(states, inner, linear, layer, dropout)
        return found
    total = states + drop(linear(inner), dropout, training=True)
    return total, layer(total)


def project(states: Tensor, weight: Tensor, bias: Tensor, num_parts: int = 1, *, kernels: bool) -> tuple[Tensor, ...]:
    """x, for who goes on reading it, and W x + b in equal parts."""
    if kernels and fits(states):
        return _kernels().project(states, weight, bias, num_parts)  # type: ignore[no-any-return]
    return states, *F.linear(states, weight, bias).chunk(num_parts, dim=-1)


def expand(states: Tensor, linear: nn.Linear, *, quick: bool = False, kernels: bool) -> tuple[Tensor, Tensor]:
    """x, for who goes on reading it, and GELU(W x + b).

    Args:
        states: shape (..., D).
        quick: x * sigmoid(1.702 x) in its place, as CLIP has it.

    Returns: shapes (..., D) and (..., E).
    """
    if kernels and fits(states):
        return _kernels().expand(states, linear, quick=quick)  # type: ignore[no-any-return]
    inner = linear(states)
    # Keeping one tensor for the backward pass instead of three.
    return states, F.silu(1.702 * inner) / 1.702 if quick else F.gelu(inner)


class Shared(NamedTuple):
    """Which of N rows each of R rows reads; some may read the same."""

    index_R: Tensor
    order_R: Tensor | None
    """R rows in the order of what they read; None without kernels."""
    start_Z: Tensor | None
    """N + 1 places in that order: where the readers of each begin, and where those of the last end."""

    def take(self, states_NPD: Tensor) -> Tensor:
        """What each reads, shape (R, P, D).

        The gradients of the readers of a row are added up in one order; torch's own sums on a GPU have none, and round
        to the states' type at each.
        """
        if self.order_R is None or not fits(states_NPD):
            return states_NPD.index_select(0, self.index_R)
        return _kernels().take(states_NPD, *self)  # type: ignore[no-any-return]


def share(index_R: Tensor, states_NPD: Tensor, *, kernels: bool) -> Shared:
    """Prepare to read rows of such states."""
    if not kernels or not fits(states_NPD):
        return Shared(index_R, None, None)
    sorted_R, order_R = index_R.sort(stable=True)
    number_Z = torch.arange(len(states_NPD) + 1, device=index_R.device)
    return Shared(index_R, order_R, torch.searchsorted(sorted_R, number_Z))
