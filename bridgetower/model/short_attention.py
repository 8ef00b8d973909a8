"""Attention between rows of which one side is short, in Triton; imported only where there is a GPU for it.

A text has a dozen tokens and an image 325 positions. FlashAttention's kernels work on tiles of 128 by 128, nine tenths of
them padding here, and meet in memory. Here a program has a head of a row to itself: the short side stands in one tile,
the long one goes by, and each gradient is written once.

The scores of a row are computed again in the backward pass, and so are the dropped shares: 32 random bits each, by
Philox from a key.

Shapes: T queries and S keys of all rows, R rows, H heads, d width of a head (WIDTH); a tile has QUERIES by KEYS scores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridgetower.model.dropout import draw_key

LONGEST = 64
"""Of the short side."""
_LONGEST_OTHER = 4 * 512  # positions that have random words of their own
_TILE = 64  # of the long side
_WARPS = 4
_SMALLEST = 16  # that matrix units take
_ROUNDS = tl.constexpr(7)


@triton.jit
def _draw_kept(
    draw_key, query, key_block, head, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr
):
    """Which shares of a tile are left. Philox gives four words at a time, for four keys."""
    four = key_block * (KEYS // 4) + tl.arange(0, KEYS // 4)
    place = ((query * HEADS + head) * 512)[:, None] + four[None, :]
    a, b, c, d = tl.randint4x(draw_key, place, n_rounds=_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (QUERIES, KEYS))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit(do_not_specialize=["draw_key", "threshold"])
def _few_keys_forward(
    query, key, value, query_start, key_start, draw_key, attended, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at_key = first_key + tl.arange(0, KEYS)
    is_key = at_key < end_key
    keys = tl.load(key + at_key[:, None] * KEY_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0)
    values = tl.load(value + at_key[:, None] * VALUE_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0)
    for start in range(first, end, QUERIES):
        at = start + tl.arange(0, QUERIES)
        inside = (at < end)[:, None]
        queries = tl.load(query + at[:, None].to(tl.int64) * QUERY_STRIDE + channel[None, :], mask=inside, other=0.0)
        score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
        share = tl.exp(score - tl.max(score, axis=1)[:, None])
        share /= tl.sum(share, axis=1)[:, None]
        if DROPS:
            share = tl.where(_draw_kept(draw_key, at, 0, head, threshold, QUERIES, KEYS, HEADS), share * left, 0.0)
        result = tl.dot(share.to(values.dtype), values)
        to = attended + at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        tl.store(to, result.to(attended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["draw_key", "threshold"])
def _few_keys_backward(
    query, key, value, query_start, key_start, draw_key, gradient, query_grad, key_grad, value_grad, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at_key = first_key + tl.arange(0, KEYS)
    is_key = at_key < end_key
    keys = tl.load(key + at_key[:, None] * KEY_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0)
    values = tl.load(value + at_key[:, None] * VALUE_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0)
    key_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    value_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(first, end, QUERIES):
        at = start + tl.arange(0, QUERIES)
        inside = (at < end)[:, None]
        packed = at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        queries = tl.load(query + at[:, None].to(tl.int64) * QUERY_STRIDE + channel[None, :], mask=inside, other=0.0)
        gradients = tl.load(gradient + packed, mask=inside, other=0.0)
        score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
        share = tl.exp(score - tl.max(score, axis=1)[:, None])
        share /= tl.sum(share, axis=1)[:, None]
        share_grad = tl.dot(gradients, tl.trans(values))
        left_share = share
        if DROPS:
            is_left = _draw_kept(draw_key, at, 0, head, threshold, QUERIES, KEYS, HEADS)
            left_share = tl.where(is_left, share * left, 0.0)
            share_grad = tl.where(is_left, share_grad * left, 0.0)
        value_sum += tl.dot(tl.trans(left_share.to(values.dtype)), gradients)
        score_grad = share * (share_grad - tl.sum(share * share_grad, axis=1)[:, None]) * scale
        score_grad = score_grad.to(keys.dtype)
        tl.store(query_grad + packed, tl.dot(score_grad, keys).to(query_grad.dtype.element_ty), mask=inside)
        key_sum += tl.dot(tl.trans(score_grad), queries)
    packed = at_key[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
    tl.store(key_grad + packed, key_sum.to(key_grad.dtype.element_ty), mask=is_key[:, None])
    tl.store(value_grad + packed, value_sum.to(value_grad.dtype.element_ty), mask=is_key[:, None])


@triton.jit(do_not_specialize=["draw_key", "threshold"])
def _few_queries_forward(
    query, key, value, query_start, key_start, draw_key, attended, log_sum, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at = first + tl.arange(0, QUERIES)
    inside = (at < end)[:, None]
    queries = tl.load(query + at[:, None] * QUERY_STRIDE + channel[None, :], mask=inside, other=0.0)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    # A row without a query, as in the last layer, reads no key.
    for start in range(first_key, tl.where(first < end, end_key, first_key), KEYS):
        at_key = start + tl.arange(0, KEYS)
        is_key = at_key < end_key
        keys = tl.load(
            key + at_key[:, None].to(tl.int64) * KEY_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0
        )
        values = tl.load(
            value + at_key[:, None].to(tl.int64) * VALUE_STRIDE + channel[None, :], mask=is_key[:, None], other=0.0
        )
        score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        share = tl.exp(score - new_highest[:, None])
        before = tl.exp(highest - new_highest)
        total = total * before + tl.sum(share, axis=1)
        highest = new_highest
        if DROPS:
            block = (start - first_key) // KEYS
            share = tl.where(_draw_kept(draw_key, at, block, head, threshold, QUERIES, KEYS, HEADS), share * left, 0.0)
        result = result * before[:, None] + tl.dot(share.to(values.dtype), values)
    result /= total[:, None]
    to = attended + at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
    tl.store(to, result.to(attended.dtype.element_ty), mask=inside)
    tl.store(log_sum + at * HEADS + head, highest + tl.log(total), mask=at < end)


@triton.jit(do_not_specialize=["draw_key", "threshold"])
def _few_queries_backward(
    query, key, value, query_start, key_start, draw_key, attended, log_sum, gradient, query_grad, key_grad, value_grad,
    scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at = first + tl.arange(0, QUERIES)
    inside = (at < end)[:, None]
    packed = at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
    queries = tl.load(query + at[:, None] * QUERY_STRIDE + channel[None, :], mask=inside, other=0.0)
    gradients = tl.load(gradient + packed, mask=inside, other=0.0)
    along = tl.load(attended + packed, mask=inside, other=0.0).to(tl.float32) * gradients.to(tl.float32)
    along = tl.sum(along, axis=1)
    logs = tl.load(log_sum + at * HEADS + head, mask=at < end, other=float("inf"))
    query_sum = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(first_key, end_key, KEYS):
        at_key = start + tl.arange(0, KEYS)
        is_key = (at_key < end_key)[:, None]
        packed_key = at_key[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        keys = tl.load(key + at_key[:, None].to(tl.int64) * KEY_STRIDE + channel[None, :], mask=is_key, other=0.0)
        values = tl.load(value + at_key[:, None].to(tl.int64) * VALUE_STRIDE + channel[None, :], mask=is_key, other=0.0)
        # Of a key or query that is not there the products below are zero, as it and its gradient are.
        share = tl.exp(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
        share = tl.where((at_key < end_key)[None, :], share, 0.0)
        share_grad = tl.dot(gradients, tl.trans(values))
        left_share = share
        if DROPS:
            block = (start - first_key) // KEYS
            is_left = _draw_kept(draw_key, at, block, head, threshold, QUERIES, KEYS, HEADS)
            left_share = tl.where(is_left, share * left, 0.0)
            share_grad = tl.where(is_left, share_grad * left, 0.0)
        value_sum = tl.dot(tl.trans(left_share.to(values.dtype)), gradients)
        score_grad = (share * (share_grad - along[:, None]) * scale).to(keys.dtype)
        key_sum = tl.dot(tl.trans(score_grad), queries)
        query_sum += tl.dot(score_grad, keys)
        tl.store(key_grad + packed_key, key_sum.to(key_grad.dtype.element_ty), mask=is_key)
        tl.store(value_grad + packed_key, value_sum.to(value_grad.dtype.element_ty), mask=is_key)
    tl.store(query_grad + packed, query_sum.to(query_grad.dtype.element_ty), mask=inside)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; with few queries also the results."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THd: Tensor,
        key_SHd: Tensor,
        value_SHd: Tensor,
        query_start_Z: Tensor,
        key_start_Z: Tensor,
        longest_query: int,
        longest_key: int,
        dropout: float,
    ) -> Tensor:
        parts = [_with_heads_together(part) for part in (query_THd, key_SHd, value_SHd)]
        num_queries, heads, width = query_THd.shape
        attended_THd = torch.empty(num_queries, heads, width, dtype=query_THd.dtype, device=query_THd.device)
        few_keys = longest_key <= LONGEST
        queries, keys = (_tile(longest) for longest in (longest_query, longest_key))
        ctx.sizes = {
            "HEADS": heads,
            "WIDTH": width,
            "QUERIES": queries,
            "KEYS": keys,
            "DROPS": dropout > 0.0,
            "num_warps": _WARPS,
            **{f"{name}_STRIDE": part.stride(0) for name, part in zip(("QUERY", "KEY", "VALUE"), parts, strict=True)},
        }
        ctx.draw_key = draw_key(query_THd.device) if dropout else 0
        ctx.numbers = width**-0.5, round(dropout * 2**32), 1.0 / (1.0 - dropout)
        read = [*parts, query_start_Z, key_start_Z]
        grid = len(query_start_Z) - 1, heads
        if few_keys:
            _few_keys_forward[grid](*read, ctx.draw_key, attended_THd, *ctx.numbers, **ctx.sizes)
        else:
            log_sum_TH = torch.empty(num_queries, heads, dtype=torch.float32, device=query_THd.device)
            _few_queries_forward[grid](*read, ctx.draw_key, attended_THd, log_sum_TH, *ctx.numbers, **ctx.sizes)
            read += [attended_THd, log_sum_TH]
        ctx.save_for_backward(*read)
        ctx.few_keys = few_keys
        return attended_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THd: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputing gives them only once
        read, results = saved[:5], saved[5:]
        grads = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in read[:3]]
        kernel = _few_keys_backward if ctx.few_keys else _few_queries_backward
        grid = len(read[3]) - 1, grads[0].shape[1]
        kernel[grid](*read, ctx.draw_key, *results, gradient_THd.contiguous(), *grads, *ctx.numbers, **ctx.sizes)
        return *grads, None, None, None, None, None


def takes(longest_query: int, longest_key: int, width: int) -> bool:
    """Whether rows of such lengths are for these kernels."""
    is_short = min(longest_query, longest_key) <= LONGEST and max(longest_query, longest_key) <= _LONGEST_OTHER
    return is_short and width >= _SMALLEST and width == triton.next_power_of_2(width)


def attend_short(
    query_THd: Tensor,
    key_SHd: Tensor,
    value_SHd: Tensor,
    query_start_Z: Tensor,
    key_start_Z: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
) -> Tensor:
    """Scaled dot-product attention of each row's queries to its own keys, of one of which there are at most LONGEST.

    Args:
        query_start_Z: int32, R + 1 numbers: the first query of each row, and the end of the last.
        key_start_Z: that of the keys, of which each row has one.

    Returns: shape (T, H, d).
    """
    found: Tensor = _Attention.apply(
        query_THd, key_SHd, value_SHd, query_start_Z, key_start_Z, longest_query, longest_key, dropout
    )
    return found


def _tile(longest: int) -> int:
    return min(_TILE, max(_SMALLEST, triton.next_power_of_2(longest)))


def _with_heads_together(part_THd: Tensor) -> Tensor:
    """Heads of a token one after the other; tokens may stand apart, as in a joint projection."""
    width = part_THd.shape[2]
    return part_THd if part_THd.stride()[1:] == (width, 1) else part_THd.contiguous()
