"""Triton kernels for self-attention within rows of one length; imported only where Triton is installed.

A program holds a tile of queries (or of keys) and loops over the keys (or queries) of its row. The last few are taken
in tiles of TAIL, so that little is computed for positions behind the end of the row. Sums are in float32. The backward
pass computes the scores again, and writes one partial sum per tile for the gradient of the projections' bias.

A tile has QUERIES by KEYS scores; WIDTH is the width of a head. Positions of queries, keys and values are STRIDE apart,
since one matmul gives all three; those of results are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part_of_row(pointer, row, head, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the pointer to the first channel of a head in a row."""
    return pointer + row.to(tl.int64) * length * STRIDE + head * WIDTH


@triton.jit
def _load_rows(part, at, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr):
    """Load positions of a row; with ENDS the tile may reach behind the end of the row, where it is zero."""
    pointers = part + at[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    if ENDS:
        return tl.load(pointers, mask=(at < length)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_sum_of_rows(to, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store the sum of a tile over its rows.

    A matmul with ones runs on the matrix units; a plain sum would shuffle numbers between the lanes of each warp.
    """
    row = tl.arange(0, ROWS)[:, None]
    sums = tl.dot(tl.full((ROWS, ROWS), 1.0, tile.dtype), tile)  # each row holds the sum
    tl.store(to + row * 0 + tl.arange(0, WIDTH)[None, :], sums, mask=row == 0)


@triton.jit
def _attend_to_keys(
    queries, key_part, value_part, highest, total, result, start, length, scale,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax: highest score, sum of probabilities, and weighted sum of values."""
    at_key = start + tl.arange(0, KEYS)
    keys = _load_rows(key_part, at_key, length, STRIDE, WIDTH, ENDS)
    values = _load_rows(value_part, at_key, length, STRIDE, WIDTH, ENDS)
    score = tl.dot(queries, tl.trans(keys)) * scale
    if ENDS:
        score = tl.where((at_key < length)[None, :], score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, axis=1))
    probability = tl.exp2(score - new_highest[:, None])
    before = tl.exp2(highest - new_highest)
    total = total * before + tl.sum(probability, axis=1)
    result = tl.dot(probability.to(values.dtype), values, result * before[:, None])
    return new_highest, total, result


@triton.jit
def rows_forward(
    query, key, value, attended, log_sum, length, scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries to all keys of the row. ``scale`` and ``log_sum`` are to base 2, for exp2."""
    tiles = tl.cdiv(length, QUERIES)
    tile, which = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row, head = which // HEADS, which % HEADS
    query_part = _part_of_row(query, row, head, length, STRIDE, WIDTH)
    key_part = _part_of_row(key, row, head, length, STRIDE, WIDTH)
    value_part = _part_of_row(value, row, head, length, STRIDE, WIDTH)
    at = tile * QUERIES + tl.arange(0, QUERIES)
    queries = _load_rows(query_part, at, length, STRIDE, WIDTH, True)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        highest, total, result = _attend_to_keys(
            queries, key_part, value_part, highest, total, result, start, length, scale,
            STRIDE, WIDTH, KEYS, False,
        )  # fmt: skip
    for start in range(whole, length, TAIL):
        highest, total, result = _attend_to_keys(
            queries, key_part, value_part, highest, total, result, start, length, scale,
            STRIDE, WIDTH, TAIL, True,
        )  # fmt: skip
    result /= total[:, None]
    packed = _part_of_row(attended, row, head, length, HEADS * WIDTH, WIDTH)
    to = packed + at[:, None] * (HEADS * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(to, result.to(attended.dtype.element_ty), mask=(at < length)[:, None])
    tl.store(log_sum + which * length + at, highest + tl.log2(total), mask=at < length)


@triton.jit
def _add_query_grad(
    queries, gradients, logs, along, key_part, value_part, query_sum, start, length, scale,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one tile of keys to the gradient of the queries."""
    at_key = start + tl.arange(0, KEYS)
    keys = _load_rows(key_part, at_key, length, STRIDE, WIDTH, ENDS)
    values = _load_rows(value_part, at_key, length, STRIDE, WIDTH, ENDS)
    probability = tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
    if ENDS:  # behind the end of the row it may be infinite
        probability = tl.where((at_key < length)[None, :], probability, 0.0)
    probability_grad = tl.dot(gradients, tl.trans(values))
    score_grad = (probability * (probability_grad - along[:, None])).to(keys.dtype)
    return tl.dot(score_grad, keys, query_sum)


@triton.jit
def rows_backward_of_queries(
    query, key, value, attended, log_sum, gradient, along_sum, query_grad, partial,
    length, scale, score_scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of queries.

    Also writes ``along_sum``, the dot product of each query's result and gradient, which the softmax's backward pass
    subtracts from every probability's gradient; ``rows_backward_of_keys`` reads it.
    """
    tiles = tl.cdiv(length, QUERIES)
    tile, which = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row, head = which // HEADS, which % HEADS
    query_part = _part_of_row(query, row, head, length, STRIDE, WIDTH)
    key_part = _part_of_row(key, row, head, length, STRIDE, WIDTH)
    value_part = _part_of_row(value, row, head, length, STRIDE, WIDTH)
    at = tile * QUERIES + tl.arange(0, QUERIES)
    inside = at < length
    queries = _load_rows(query_part, at, length, STRIDE, WIDTH, True)
    gradient_part = _part_of_row(gradient, row, head, length, HEADS * WIDTH, WIDTH)
    gradients = _load_rows(gradient_part, at, length, HEADS * WIDTH, WIDTH, True)
    attended_part = _part_of_row(attended, row, head, length, HEADS * WIDTH, WIDTH)
    result = _load_rows(attended_part, at, length, HEADS * WIDTH, WIDTH, True)
    along = tl.sum(result.to(tl.float32) * gradients.to(tl.float32), axis=1)
    tl.store(along_sum + which * length + at, along, mask=inside)
    logs = tl.load(log_sum + which * length + at, mask=inside, other=float("inf"))
    query_sum = tl.zeros((QUERIES, WIDTH), tl.float32)
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        query_sum = _add_query_grad(
            queries, gradients, logs, along, key_part, value_part, query_sum, start, length, scale,
            STRIDE, WIDTH, KEYS, False,
        )  # fmt: skip
    for start in range(whole, length, TAIL):
        query_sum = _add_query_grad(
            queries, gradients, logs, along, key_part, value_part, query_sum, start, length, scale,
            STRIDE, WIDTH, TAIL, True,
        )  # fmt: skip
    query_sum = (query_sum * score_scale).to(query_grad.dtype.element_ty)
    to = _part_of_row(query_grad, row, head, length, STRIDE, WIDTH)
    tl.store(to + at[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :], query_sum, mask=inside[:, None])
    # Rows behind the end are zero, so that the sum needs no mask.
    _store_sum_of_rows(partial + (row * tiles + tile) * STRIDE + head * WIDTH, query_sum, QUERIES, WIDTH)


@triton.jit
def _add_key_grads(
    keys, values, query_part, gradient_part, logs, alongs, key_sum, value_sum, start, length, scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one tile of queries to the gradients of keys and values; scores are (KEYS, QUERIES)."""
    at = start + tl.arange(0, QUERIES)
    queries = _load_rows(query_part, at, length, STRIDE, WIDTH, ENDS)
    gradients = _load_rows(gradient_part, at, length, HEADS * WIDTH, WIDTH, ENDS)
    if ENDS:
        log = tl.load(logs + at, mask=at < length, other=float("inf"))  # behind the end of the row the probability is 0
        along = tl.load(alongs + at, mask=at < length, other=0.0)
    else:
        log, along = tl.load(logs + at), tl.load(alongs + at)
    probability = tl.exp2(tl.dot(keys, tl.trans(queries)) * scale - log[None, :])
    probability_grad = tl.dot(values, tl.trans(gradients))
    value_sum = tl.dot(probability.to(queries.dtype), gradients, value_sum)
    score_grad = (probability * (probability_grad - along[None, :])).to(queries.dtype)
    key_sum = tl.dot(score_grad, queries, key_sum)
    return key_sum, value_sum


@triton.jit
def rows_backward_of_keys(
    query, key, value, log_sum, gradient, along_sum, key_grad, value_grad, partial,
    length, scale, score_scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys and values, over all queries of the row."""
    tiles = tl.cdiv(length, KEYS)
    tile, which = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row, head = which // HEADS, which % HEADS
    query_part = _part_of_row(query, row, head, length, STRIDE, WIDTH)
    gradient_part = _part_of_row(gradient, row, head, length, HEADS * WIDTH, WIDTH)
    logs, alongs = log_sum + which * length, along_sum + which * length
    at_key = tile * KEYS + tl.arange(0, KEYS)
    keys = _load_rows(_part_of_row(key, row, head, length, STRIDE, WIDTH), at_key, length, STRIDE, WIDTH, True)
    values = _load_rows(_part_of_row(value, row, head, length, STRIDE, WIDTH), at_key, length, STRIDE, WIDTH, True)
    key_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    value_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    whole = length // QUERIES * QUERIES
    for start in range(0, whole, QUERIES):
        key_sum, value_sum = _add_key_grads(
            keys, values, query_part, gradient_part, logs, alongs, key_sum, value_sum, start, length, scale,
            STRIDE, HEADS, WIDTH, QUERIES, False,
        )  # fmt: skip
    for start in range(whole, length, TAIL):
        key_sum, value_sum = _add_key_grads(
            keys, values, query_part, gradient_part, logs, alongs, key_sum, value_sum, start, length, scale,
            STRIDE, HEADS, WIDTH, TAIL, True,
        )  # fmt: skip
    # Keys behind the end are loaded as zeros, but exp2 gives them a probability: keep them out of results and sums.
    inside = (at_key < length)[:, None]
    key_sum = tl.where(inside, key_sum * score_scale, 0.0).to(key_grad.dtype.element_ty)
    value_sum = tl.where(inside, value_sum, 0.0).to(value_grad.dtype.element_ty)
    offset = at_key[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    tl.store(_part_of_row(key_grad, row, head, length, STRIDE, WIDTH) + offset, key_sum, mask=inside)
    tl.store(_part_of_row(value_grad, row, head, length, STRIDE, WIDTH) + offset, value_sum, mask=inside)
    sums = partial + (row * tiles + tile) * STRIDE + head * WIDTH
    _store_sum_of_rows(sums + HEADS * WIDTH, key_sum, KEYS, WIDTH)
    _store_sum_of_rows(sums + 2 * HEADS * WIDTH, value_sum, KEYS, WIDTH)
