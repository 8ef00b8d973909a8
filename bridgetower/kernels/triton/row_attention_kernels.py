"""Kernels in Triton for rows of one length whose positions attend to each other; imported only where there is Triton.

A program has a tile of queries or of keys, and the others go by; the last few in tiles of TAIL, so that little is
computed for what is not there. Sums are in float32. The backward pass computes scores again. It leaves a sum for each
tile, for the gradient of the projections' bias.

A tile has QUERIES by KEYS scores; WIDTH is that of a head. Positions of queries, keys and values are STRIDE apart, as
those that one product gives, those of results one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part_of_row(pointer, row, head, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Where the channels of a head begin in a row."""
    return pointer + row.to(tl.int64) * length * STRIDE + head * WIDTH


@triton.jit
def _load_rows(part, at, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr):
    """Positions of a row; zero from its end on, where it may end."""
    place = part + at[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    if ENDS:
        return tl.load(place, mask=(at < length)[:, None], other=0.0)
    return tl.load(place)


@triton.jit
def _store_sum_of_rows(to, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of what is kept of a tile, as a product with ones: a sum over rows would go from lane to lane of each warp."""
    row = tl.arange(0, ROWS)[:, None]
    sums = tl.dot(tl.full((ROWS, ROWS), 1.0, tile.dtype), tile)  # the same in each row
    tl.store(to + row * 0 + tl.arange(0, WIDTH)[None, :], sums, mask=row == 0)


@triton.jit
def _attend_to_keys(
    queries, key_part, value_part, highest, total, result, start, length, scale,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the highest scores, the sums of shares, and those of values so far."""
    at_key = start + tl.arange(0, KEYS)
    keys = _load_rows(key_part, at_key, length, STRIDE, WIDTH, ENDS)
    values = _load_rows(value_part, at_key, length, STRIDE, WIDTH, ENDS)
    score = tl.dot(queries, tl.trans(keys)) * scale
    if ENDS:
        score = tl.where((at_key < length)[None, :], score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, axis=1))
    share = tl.exp2(score - new_highest[:, None])
    before = tl.exp2(highest - new_highest)
    total = total * before + tl.sum(share, axis=1)
    result = tl.dot(share.to(values.dtype), values, result * before[:, None])
    return new_highest, total, result


@triton.jit
def rows_forward(
    query, key, value, attended, log_sum, length, scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of queries, to which the row's keys go by. Scales and logarithms are of powers of 2."""
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
    """What one tile of keys adds."""
    at_key = start + tl.arange(0, KEYS)
    keys = _load_rows(key_part, at_key, length, STRIDE, WIDTH, ENDS)
    values = _load_rows(value_part, at_key, length, STRIDE, WIDTH, ENDS)
    share = tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
    if ENDS:  # of a key that is not there it may be infinite
        share = tl.where((at_key < length)[None, :], share, 0.0)
    share_grad = tl.dot(gradients, tl.trans(values))
    score_grad = (share * (share_grad - along[:, None])).to(keys.dtype)
    return tl.dot(score_grad, keys, query_sum)


@triton.jit
def rows_backward_of_queries(
    query, key, value, attended, log_sum, gradient, along_sum, query_grad, partial,
    length, scale, score_scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of queries, to which the row's keys go by. Leaves what all share gradients of a query have in common."""
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
    # Of queries that are not there it is zero.
    _store_sum_of_rows(partial + (row * tiles + tile) * STRIDE + head * WIDTH, query_sum, QUERIES, WIDTH)


@triton.jit
def _add_key_grads(
    keys, values, query_part, gradient_part, logs, alongs, key_sum, value_sum, start, length, scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the gradients of keys and values. Scores stand with the keys first."""
    at = start + tl.arange(0, QUERIES)
    queries = _load_rows(query_part, at, length, STRIDE, WIDTH, ENDS)
    gradients = _load_rows(gradient_part, at, length, HEADS * WIDTH, WIDTH, ENDS)
    if ENDS:
        log = tl.load(logs + at, mask=at < length, other=float("inf"))  # a query that is not there has no share
        along = tl.load(alongs + at, mask=at < length, other=0.0)
    else:
        log, along = tl.load(logs + at), tl.load(alongs + at)
    share = tl.exp2(tl.dot(keys, tl.trans(queries)) * scale - log[None, :])
    share_grad = tl.dot(values, tl.trans(gradients))
    value_sum = tl.dot(share.to(queries.dtype), gradients, value_sum)
    score_grad = (share * (share_grad - along[None, :])).to(queries.dtype)
    key_sum = tl.dot(score_grad, queries, key_sum)
    return key_sum, value_sum


@triton.jit
def rows_backward_of_keys(
    query, key, value, log_sum, gradient, along_sum, key_grad, value_grad, partial,
    length, scale, score_scale,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of keys and their values, to which the row's queries go by."""
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
    # A key that is not there is zero, and its share of a query is not: it is not written, and no part of the sums.
    inside = (at_key < length)[:, None]
    key_sum = tl.where(inside, key_sum * score_scale, 0.0).to(key_grad.dtype.element_ty)
    value_sum = tl.where(inside, value_sum, 0.0).to(value_grad.dtype.element_ty)
    place = at_key[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    tl.store(_part_of_row(key_grad, row, head, length, STRIDE, WIDTH) + place, key_sum, mask=inside)
    tl.store(_part_of_row(value_grad, row, head, length, STRIDE, WIDTH) + place, value_sum, mask=inside)
    sums = partial + (row * tiles + tile) * STRIDE + head * WIDTH
    _store_sum_of_rows(sums + HEADS * WIDTH, key_sum, KEYS, WIDTH)
    _store_sum_of_rows(sums + 2 * HEADS * WIDTH, value_sum, KEYS, WIDTH)
