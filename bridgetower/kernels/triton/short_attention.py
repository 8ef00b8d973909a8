"""Attention between rows of which one side is short, by kernels in Triton; imported only where there is Triton.

A text has a dozen tokens and an image 325 positions. FlashAttention's kernels work on tiles of 128 by 128, nine tenths
of them padding here, and their gradients meet in memory.

Shapes: T queries and S keys of all rows, R rows, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridgetower.kernels.keys import draw_key, no_key, odds
from bridgetower.kernels.layout import Spans, tile_size
from bridgetower.kernels.triton import short_attention_kernels as kernels

LONGEST = 64
"""Of the short side."""
_LONGEST_OTHER = 4 * 512  # positions that have random words of their own
_WARPS = 4


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; with few queries also the results."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THd: Tensor,
        key_SHd: Tensor,
        value_SHd: Tensor,
        query_spans: Spans,
        key_spans: Spans,
        dropout: float,
    ) -> Tensor:
        parts = [_with_heads_together(part) for part in (query_THd, key_SHd, value_SHd)]
        num_queries, heads, width = query_THd.shape
        attended_THd = _written_by(query_spans)(query_THd.shape, dtype=query_THd.dtype, device=query_THd.device)
        few_keys = key_spans.longest <= LONGEST
        queries, keys = (tile_size(longest) for longest in (query_spans.longest, key_spans.longest))
        ctx.sizes = {
            "HEADS": heads,
            "WIDTH": width,
            "QUERIES": queries,
            "KEYS": keys,
            "DROPS": dropout > 0.0,
            "num_warps": _WARPS,
            **{f"{name}_STRIDE": part.stride(0) for name, part in zip(("QUERY", "KEY", "VALUE"), parts, strict=True)},
        }
        key = draw_key(query_THd.device) if dropout else no_key(query_THd)
        ctx.key = key if dropout else None
        ctx.numbers = width**-0.5, *odds(dropout)
        read = [*parts, query_spans.start_Z, key_spans.start_Z]
        grid = len(query_spans.start_Z) - 1, heads
        if few_keys:
            kernels.few_keys_forward[grid](*read, *key, attended_THd, *ctx.numbers, **ctx.sizes)
        else:
            log_sum_TH = torch.empty(num_queries, heads, dtype=torch.float32, device=query_THd.device)
            kernels.few_queries_forward[grid](*read, *key, attended_THd, log_sum_TH, *ctx.numbers, **ctx.sizes)
            read += [attended_THd, log_sum_TH]
        ctx.save_for_backward(*read)
        ctx.few_keys = few_keys
        ctx.makers = _written_by(query_spans), *[_written_by(key_spans)] * 2
        return attended_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THd: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputing gives them only once
        read, results = saved[:5], saved[5:]
        grads = [
            make(part.shape, dtype=part.dtype, device=part.device)
            for make, part in zip(ctx.makers, read[:3], strict=True)
        ]
        kernel = kernels.few_keys_backward if ctx.few_keys else kernels.few_queries_backward
        grid = len(read[3]) - 1, grads[0].shape[1]
        key = ctx.key or no_key(read[0])
        kernel[grid](*read, *key, *results, gradient_THd.contiguous(), *grads, *ctx.numbers, **ctx.sizes)
        return *grads, None, None, None


def takes(longest_query: int, longest_key: int, width: int) -> bool:
    """Whether rows of such lengths are for these kernels."""
    is_short = min(longest_query, longest_key) <= LONGEST and max(longest_query, longest_key) <= _LONGEST_OTHER
    # Wider heads would not fit into the memory that a program has.
    return is_short and width in (16, 32, 64)


def attend_short(
    query_THd: Tensor,
    key_SHd: Tensor,
    value_SHd: Tensor,
    query_spans: Spans,
    key_spans: Spans,
    dropout: float,
) -> Tensor:
    """Scaled dot-product attention of each row's queries to its own keys, of one of which there are at most LONGEST.

    Args:
        key_spans: each row has a key.

    Returns: shape (T, H, d).
    """
    found: Tensor = _Attention.apply(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)
    return found


def _written_by(spans: Spans) -> Callable[..., Tensor]:
    """Makes what kernels write row by row: empty, or zero, if there are tokens of no row."""
    return torch.empty if spans.covers else torch.zeros


def _with_heads_together(part_THd: Tensor) -> Tensor:
    """Heads of a token one after the other; tokens may stand apart, as in a joint projection."""
    width = part_THd.shape[2]
    return part_THd if part_THd.stride()[1:] == (width, 1) else part_THd.contiguous()
