"""Dropout on a CPU with 32 random bits and a byte per element, where torch draws a double and keeps a float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Elements whose masks are drawn at once, so that their random words stay in the CPU's cache.
_BLOCK = 2**18


def drop(states: Tensor, dropout: float) -> Tensor:
    """Return the states of a CPU after dropout, distributed as after torch's; 0 returns them as they are."""
    if not dropout:
        return states
    dropped: Tensor = _Dropout.apply(states, draw_dropped(states.shape, dropout), 1.0 / (1.0 - dropout))
    return dropped


def draw_dropped(shape: Sequence[int], dropout: float) -> Tensor:
    """Return a bool mask, True with the probability ``dropout`` to 2^-32, from torch's generator of the CPU.

    Args:
        dropout: from 0 to below 1.
    """
    is_dropped = torch.empty(tuple(shape), dtype=torch.bool)
    words = torch.empty(min(_BLOCK, is_dropped.numel()) // 2 + 1, dtype=torch.int64)
    for block in is_dropped.view(-1).split(_BLOCK):
        halves = words.random_(-(2**63), None).view(torch.int32)  # all 64 bits
        torch.lt(halves[: len(block)], round(dropout * 2**32) - 2**31, out=block)
    return is_dropped


def zero_dropped(states: Tensor, is_dropped: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the states with zeros where the mask is True."""
    return torch.where(is_dropped, states.new_zeros(()), states, out=out)


class _Dropout(torch.autograd.Function):
    """Keeps nothing but the mask."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, is_dropped: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(is_dropped)
        ctx.scale = scale
        return zero_dropped(states, is_dropped).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return zero_dropped(gradient, *ctx.saved_tensors).mul_(ctx.scale), None, None
