"""Triton kernels for attention in which queries or keys are few; imported only where Triton is installed.

A program computes one head of one row: it holds the short side in one tile and loops over the long side, so that it
writes each gradient once. Sums are in float32. The backward pass computes the scores again, and draws the dropout mask
again: 32 random bits per probability, which Philox draws from a key.

A tile has QUERIES by KEYS scores; WIDTH is the width of a head. ``query_start`` and ``key_start`` hold the first token
of each row, and the end of the last row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bridgetower.kernels.triton.layer_kernels import PHILOX_ROUNDS


@triton.jit
def _draw_kept(row_key, query, first_key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return True for the probabilities of a tile that survive dropout. Each call of Philox gives words for four keys.

    Queries and keys are counted from the first of their row, so that counters fit into 32 bits for any batch.
    """
    four = first_key // 4 + tl.arange(0, KEYS // 4)
    counter = (query * 512)[:, None] + four[None, :]
    a, b, c, d = tl.randint4x(row_key, counter, n_rounds=PHILOX_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (QUERIES, KEYS))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def _load_tile(pointer, at, end, channel, STRIDE: tl.constexpr):
    """Load tokens of a row in the channels of a head; zero behind the end of the row."""
    offset = at.to(tl.int64)[:, None] * STRIDE + channel[None, :]
    return tl.load(pointer + offset, mask=(at < end)[:, None], other=0.0)


@triton.jit
def _probabilities(queries, keys, is_key, scale):
    """Return the softmax of a tile that holds all keys of its row."""
    score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
    probability = tl.exp(score - tl.max(score, axis=1)[:, None])
    return probability / tl.sum(probability, axis=1)[:, None]


@triton.jit
def _key_of_row(key_word, key_number, row, head, HEADS: tl.constexpr):
    """Return the random key of a head of a row: each has its own, a Weyl sequence that starts at the given key."""
    return tl.load(key_word) + key_number + (row * HEADS + head).to(tl.int64) * 0x1E3779B97F4A7C15


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_keys_forward(
    query, key, value, query_start, key_start, key_word, key_number, attended, scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Attend with the keys of a row in one tile, looping over its queries."""
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
        probability = _probabilities(queries, keys, is_key, scale)
        if DROPS:
            probability = tl.where(
                _draw_kept(row_key, at - first, 0, threshold, QUERIES, KEYS), probability * left, 0.0
            )
        result = tl.dot(probability.to(values.dtype), values)
        to = attended + at[:, None].to(tl.int64) * (HEADS * WIDTH) + channel[None, :]
        tl.store(to, result.to(attended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key_number", "threshold"])
def few_keys_backward(
    query, key, value, query_start, key_start, key_word, key_number, gradient, query_grad, key_grad, value_grad,
    scale, threshold, left,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients, looping over queries; those of keys and values are summed in registers."""
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
        probability = _probabilities(queries, keys, is_key, scale)
        probability_grad = tl.dot(gradients, tl.trans(values))
        kept_probability = probability
        if DROPS:
            is_kept = _draw_kept(row_key, at - first, 0, threshold, QUERIES, KEYS)
            kept_probability = tl.where(is_kept, probability * left, 0.0)
            probability_grad = tl.where(is_kept, probability_grad * left, 0.0)
        value_sum += tl.dot(tl.trans(kept_probability.to(values.dtype)), gradients)
        score_grad = probability * (probability_grad - tl.sum(probability * probability_grad, axis=1)[:, None]) * scale
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
    """Attend with the queries of a row in one tile, looping over its keys with a running softmax."""
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
    # A row without queries, as in the pruned last layer, reads no keys.
    for start in range(first_key, tl.where(first < end, end_key, first_key), KEYS):
        at_key = start + tl.arange(0, KEYS)
        is_key = at_key < end_key
        keys = _load_tile(key, at_key, end_key, channel, KEY_STRIDE)
        values = _load_tile(value, at_key, end_key, channel, VALUE_STRIDE)
        score = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        probability = tl.exp(score - new_highest[:, None])
        before = tl.exp(highest - new_highest)
        total = total * before + tl.sum(probability, axis=1)
        highest = new_highest
        if DROPS:
            is_kept = _draw_kept(row_key, at - first, start - first_key, threshold, QUERIES, KEYS)
            probability = tl.where(is_kept, probability * left, 0.0)
        result = result * before[:, None] + tl.dot(probability.to(values.dtype), values)
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
    """Compute the gradients, looping over keys; those of queries are summed in registers."""
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
        # Keys and queries behind the end are loaded as zeros, as are their gradients, so the matmuls below add nothing.
        probability = tl.exp(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
        probability = tl.where((at_key < end_key)[None, :], probability, 0.0)
        probability_grad = tl.dot(gradients, tl.trans(values))
        kept_probability = probability
        if DROPS:
            is_kept = _draw_kept(row_key, at - first, start - first_key, threshold, QUERIES, KEYS)
            kept_probability = tl.where(is_kept, probability * left, 0.0)
            probability_grad = tl.where(is_kept, probability_grad * left, 0.0)
        value_sum = tl.dot(tl.trans(kept_probability.to(values.dtype)), gradients)
        score_grad = (probability * (probability_grad - along[:, None]) * scale).to(keys.dtype)
        key_sum = tl.dot(tl.trans(score_grad), queries)
        query_sum += tl.dot(score_grad, keys)
        tl.store(key_grad + packed_key, key_sum.to(key_grad.dtype.element_ty), mask=is_key)
        tl.store(value_grad + packed_key, value_sum.to(value_grad.dtype.element_ty), mask=is_key)
    tl.store(query_grad + packed, query_sum.to(query_grad.dtype.element_ty), mask=inside)
