"""Attention in which queries or keys are few, by Triton kernels; imported only where Triton is installed.

A caption has about a dozen tokens, and an image of the base model 325 positions. FlashAttention works on tiles of 128
by 128, nine tenths of which are padding here, and its programs add their gradients in memory.

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
"""Most tokens of the short side."""
_LONGEST_OTHER = 4 * 512  # keys up to which each element has random bits of its own
_WARPS = 4


class _Attention(torch.autograd.Function):
    """Attends. Saves queries, keys and values; with few queries also the results and their log-sum-exps."""

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
        attended_THd = _allocator(query_spans)(query_THd.shape, dtype=query_THd.dtype, device=query_THd.device)
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
        ctx.scalars = width**-0.5, *odds(dropout)
        read = [*parts, query_spans.start_Z, key_spans.start_Z]
        grid = len(query_spans.start_Z) - 1, heads
        if few_keys:
            kernels.few_keys_forward[grid](*read, *key, attended_THd, *ctx.scalars, **ctx.sizes)
        else:
            log_sum_TH = torch.empty(num_queries, heads, dtype=torch.float32, device=query_THd.device)
            kernels.few_queries_forward[grid](*read, *key, attended_THd, log_sum_TH, *ctx.scalars, **ctx.sizes)
            read += [attended_THd, log_sum_TH]
        ctx.save_for_backward(*read)
        ctx.few_keys = few_keys
        ctx.allocators = _allocator(query_spans), *[_allocator(key_spans)] * 2
        return attended_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THd: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a recomputed layer hands them out only once
        read, results = saved[:5], saved[5:]
        grads = [
            allocate(part.shape, dtype=part.dtype, device=part.device)
            for allocate, part in zip(ctx.allocators, read[:3], strict=True)
        ]
        kernel = kernels.few_keys_backward if ctx.few_keys else kernels.few_queries_backward
        grid = len(read[3]) - 1, grads[0].shape[1]
        key = ctx.key or no_key(read[0])
        kernel[grid](*read, *key, *results, gradient_THd.contiguous(), *grads, *ctx.scalars, **ctx.sizes)
        return *grads, None, None, None


def supports(longest_query: int, longest_key: int, width: int) -> bool:
    """Return True if these kernels support rows of such lengths with heads of this width."""
    is_short = min(longest_query, longest_key) <= LONGEST and max(longest_query, longest_key) <= _LONGEST_OTHER
    # Tiles of wider heads would not fit into the shared memory of a program.
    return is_short and width in (16, 32, 64)


def attend_short(
    query_THd: Tensor,
    key_SHd: Tensor,
    value_SHd: Tensor,
    query_spans: Spans,
    key_spans: Spans,
    dropout: float,
) -> Tensor:
    """Compute scaled dot-product attention of each row's queries to its own keys; one side has at most LONGEST tokens.

    Args:
        query_spans: a row may be empty.
        key_spans: every row has a key.

    Returns: shape (T, H, d).
    """
    attended_THd: Tensor = _Attention.apply(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)
    return attended_THd


def _allocator(spans: Spans) -> Callable[..., Tensor]:
    """Return the function that allocates what a kernel writes row by row: zeros if some tokens belong to no row."""
    return torch.empty if spans.covers else torch.zeros


def _with_heads_together(part_THd: Tensor) -> Tensor:
    """Return the tensor with the heads of each token contiguous; tokens may be strided, as in a joint projection."""
    width = part_THd.shape[2]
    return part_THd if part_THd.stride()[1:] == (width, 1) else part_THd.contiguous()
