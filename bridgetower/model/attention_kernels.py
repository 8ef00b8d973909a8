"""Kernels in Triton for attention, where torch's pad too much; imported only where there is Triton.

Those of few keys or queries are of rows of which one side is short. A program has a head of a row to itself: the short
side stands in one tile, the long one goes by, and each gradient is written once. ``start`` tables say where each row
begins among all tokens.

Those of rows are of rows of one length, whose positions attend to each other without dropout. A program has a tile of
queries or of keys, and the others go by; the last few in tiles of TAIL, so that little is computed for what is not
there.

Sums are in float32. The backward pass computes scores again, and draws again what was dropped: 32 random bits a share,
by Philox from a key. A tile has QUERIES by KEYS scores; WIDTH is that of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bridgetower.model.kernels import PHILOX_ROUNDS


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
    """What one tile of keys adds. Keys that are not there are zero, and add nothing."""
    at_key = start + tl.arange(0, KEYS)
    keys = _load_rows(key_part, at_key, length, STRIDE, WIDTH, ENDS)
    values = _load_rows(value_part, at_key, length, STRIDE, WIDTH, ENDS)
    share = tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - logs[:, None])
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
