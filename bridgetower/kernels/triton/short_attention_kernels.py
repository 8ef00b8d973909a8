"""Kernels in Triton for attention between rows of which one side is short; imported only where there is Triton.

A program has a head of a row to itself: the short side stands in one tile, the long one goes by, and each gradient is
written once. Sums are in float32. The backward pass computes scores again, and draws again what was dropped: 32 random
bits a share, by Philox from a key.

A tile has QUERIES by KEYS scores; WIDTH is that of a head. ``start`` tables say where each row begins among all tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bridgetower.kernels.triton.layer_kernels import PHILOX_ROUNDS


@triton.jit
def _draw_kept(row_key, query, first_key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which shares of a tile are left. Philox gives four words at a time, for four keys.

    Queries and keys count from the row's first, so that their numbers fit into 32 bits whatever the batch.
    """
    four = first_key // 4 + tl.arange(0, KEYS // 4)
    place = (query * 512)[:, None] + four[None, :]
    a, b, c, d = tl.randint4x(row_key, place, n_rounds=PHILOX_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (QUERIES, KEYS))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def _load_tile(pointer, at, end, channel, STRIDE: tl.constexpr):
    """Tokens of a row in the channels of a head; zero from its end on."""
    place = at.to(tl.int64)[:, None] * STRIDE + channel[None, :]
    return tl.load(pointer + place, mask=(at < end)[:, None], other=0.0)


@triton.jit
def _shares(queries, keys, is_key, scale):
    """Softmax of a tile that has all keys of its row."""
    score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=1)[:, None])
    return share / tl.sum(share, axis=1)[:, None]


@triton.jit
def _key_of_row(key_word, key_number, row, head, HEADS: tl.constexpr):
    """Each head of a row draws with a key of its own, a Weyl sequence from the first."""
    return tl.load(key_word) + key_number + (row * HEADS + head).to(tl.int64) * 0x1E3779B97F4A7C15


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_keys_forward(
    query, key, value, query_start, key_start, key_word, key_number, attended, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """A row's keys stand in one tile, and its queries go by."""
    row, head = tl.program_id(0), tl.program_id(1)
    if DROPS:
        row_key = _key_of_row(key_word, key_number, row, head, HEADS)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at_key = first_key + tl.arange(0, KEYS)
    is_key = at_key < end_key
    keys = _load_tile(key, at_key, end_key, channel, KEY_STRIDE)
    values = _load_tile(value, at_key, end_key, channel, VALUE_STRIDE)
    for start in range(first, end, QUERIES):
        at = start + tl.arange(0, QUERIES)
        inside = (at < end)[:, None]
        queries = _load_tile(query, at, end, channel, QUERY_STRIDE)
        share = _shares(queries, keys, is_key, scale)
        if DROPS:
            share = tl.where(_draw_kept(row_key, at - first, 0, threshold, QUERIES, KEYS), share * left, 0.0)
        result = tl.dot(share.to(values.dtype), values)
        to = attended + at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        tl.store(to, result.to(attended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_keys_backward(
    query, key, value, query_start, key_start, key_word, key_number, gradient, query_grad, key_grad, value_grad,
    scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The same; each program adds up the gradients of its keys and values."""
    row, head = tl.program_id(0), tl.program_id(1)
    if DROPS:
        row_key = _key_of_row(key_word, key_number, row, head, HEADS)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at_key = first_key + tl.arange(0, KEYS)
    is_key = at_key < end_key
    keys = _load_tile(key, at_key, end_key, channel, KEY_STRIDE)
    values = _load_tile(value, at_key, end_key, channel, VALUE_STRIDE)
    key_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    value_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(first, end, QUERIES):
        at = start + tl.arange(0, QUERIES)
        inside = (at < end)[:, None]
        packed = at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        queries = _load_tile(query, at, end, channel, QUERY_STRIDE)
        gradients = tl.load(gradient + packed, mask=inside, other=0.0)
        share = _shares(queries, keys, is_key, scale)
        share_grad = tl.dot(gradients, tl.trans(values))
        left_share = share
        if DROPS:
            is_left = _draw_kept(row_key, at - first, 0, threshold, QUERIES, KEYS)
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


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_queries_forward(
    query, key, value, query_start, key_start, key_word, key_number, attended, log_sum, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """A row's queries stand in one tile, and its keys go by."""
    row, head = tl.program_id(0), tl.program_id(1)
    if DROPS:
        row_key = _key_of_row(key_word, key_number, row, head, HEADS)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at = first + tl.arange(0, QUERIES)
    inside = (at < end)[:, None]
    queries = _load_tile(query, at, end, channel, QUERY_STRIDE)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    # A row without a query, as in the last layer, reads no key.
    for start in range(first_key, tl.where(first < end, end_key, first_key), KEYS):
        at_key = start + tl.arange(0, KEYS)
        is_key = at_key < end_key
        keys = _load_tile(key, at_key, end_key, channel, KEY_STRIDE)
        values = _load_tile(value, at_key, end_key, channel, VALUE_STRIDE)
        score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        share = tl.exp(score - new_highest[:, None])
        before = tl.exp(highest - new_highest)
        total = total * before + tl.sum(share, axis=1)
        highest = new_highest
        if DROPS:
            is_left = _draw_kept(row_key, at - first, start - first_key, threshold, QUERIES, KEYS)
            share = tl.where(is_left, share * left, 0.0)
        result = result * before[:, None] + tl.dot(share.to(values.dtype), values)
    result /= total[:, None]
    to = attended + at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
    tl.store(to, result.to(attended.dtype.element_ty), mask=inside)
    tl.store(log_sum + at * HEADS + head, highest + tl.log(total), mask=at < end)


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_queries_backward(
    query, key, value, query_start, key_start, key_word, key_number, attended, log_sum,
    gradient, query_grad, key_grad, value_grad,
    scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The same; each program adds up the gradients of its queries."""
    row, head = tl.program_id(0), tl.program_id(1)
    if DROPS:
        row_key = _key_of_row(key_word, key_number, row, head, HEADS)
    channel = head * WIDTH + tl.arange(0, WIDTH)
    first, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    first_key, end_key = tl.load(key_start + row), tl.load(key_start + row + 1)
    at = first + tl.arange(0, QUERIES)
    inside = (at < end)[:, None]
    packed = at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
    queries = _load_tile(query, at, end, channel, QUERY_STRIDE)
    gradients = tl.load(gradient + packed, mask=inside, other=0.0)
    along = tl.load(attended + packed, mask=inside, other=0.0).to(tl.float32) * gradients.to(tl.float32)
    along = tl.sum(along, axis=1)
    logs = tl.load(log_sum + at * HEADS + head, mask=at < end, other=float("inf"))
    query_sum = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(first_key, end_key, KEYS):
        at_key = start + tl.arange(0, KEYS)
        is_key = (at_key < end_key)[:, None]
        packed_key = at_key[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        keys = _load_tile(key, at_key, end_key, channel, KEY_STRIDE)
        values = _load_tile(value, at_key, end_key, channel, VALUE_STRIDE)
        # Of a key or query that is not there the products below are zero, as it and its gradient are.
        share = tl.exp(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
        share = tl.where((at_key < end_key)[None, :], share, 0.0)
        share_grad = tl.dot(gradients, tl.trans(values))
        left_share = share
        if DROPS:
            is_left = _draw_kept(row_key, at - first, start - first_key, threshold, QUERIES, KEYS)
            left_share = tl.where(is_left, share * left, 0.0)
            share_grad = tl.where(is_left, share_grad * left, 0.0)
        value_sum = tl.dot(tl.trans(left_share.to(values.dtype)), gradients)
        score_grad = (share * (share_grad - along[:, None]) * scale).to(keys.dtype)
        key_sum = tl.dot(tl.trans(score_grad), queries)
        query_sum += tl.dot(score_grad, keys)
        tl.store(key_grad + packed_key, key_sum.to(key_grad.dtype.element_ty), mask=is_key)
        tl.store(value_grad + packed_key, value_sum.to(value_grad.dtype.element_ty), mask=is_key)
    tl.store(query_grad + packed, query_sum.to(query_grad.dtype.element_ty), mask=inside)
