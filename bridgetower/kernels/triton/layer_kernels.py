"""Triton kernels for the operations between the matmuls of a layer; imported only where Triton is installed.

Sums are in float32 whatever the type of the states. Dropout compares 32 random bits per element, which Philox draws
from a key; the backward pass draws them again, so that no mask is stored. Kernels that sum over all rows write one
partial sum per program.

A program of a norm is one warp that holds whole rows, so that a sum over a row never waits for other warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The fewest rounds with which Philox passes BigCrush (Salmon et al., "Parallel random numbers", SC 2011).
PHILOX_ROUNDS = tl.constexpr(7)
_QUICK = tl.constexpr(1.702)
_ROOT_HALF, _DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)  # sqrt(1/2), 1/sqrt(2 pi)


@triton.jit
def _is_dropped(key, row, threshold, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return True for the dropped columns of a row. Each call of Philox gives four words, for four columns."""
    four = row * ((WIDTH + 3) // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(key, four, n_rounds=PHILOX_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) < threshold


@triton.jit(do_not_specialize=["key_number", "threshold"])
def norm_forward(
    states, update, update_bias, weight, bias, key_word, key_number, total, normed, mean, inverse,
    epsilon, threshold, left,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, SHIFTS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Compute the sum of states and update of a row, with bias and dropout, and its norm."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    value = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFTS:
            added += tl.load(update_bias + column, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            key = tl.load(key_word) + key_number
            added = tl.where(_is_dropped(key, row, threshold, WIDTH, BLOCK), 0.0, added * left)
        # The backward pass reads the sum as it is stored, so the norm has to read the rounded sum, too.
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    center = tl.sum(value, axis=0) / WIDTH
    centered = tl.where(inside, value - center, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / WIDTH + epsilon)
    tl.store(mean + row, center)
    tl.store(inverse + row, scale)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (centered * scale * gain + shift).to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key_number", "num_rows", "threshold"])
def norm_backward(
    normed_grad, total_grad, total, mean, inverse, weight, key_word, key_number, states_grad, update_grad, partial,
    num_rows, threshold, left,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHIFTS: tl.constexpr, DROPS: tl.constexpr, HAS_TOTAL_GRAD: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of states and update, and partial sums over rows: those of gain, shift and update bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    update_shift_sum = tl.zeros((BLOCK,), tl.float32)
    if DROPS:
        key = tl.load(key_word) + key_number
    stride = tl.full((), WIDTH, tl.int64)  # 64 bits: the elements of all rows may be more than 2^31
    # Two stages: the next row is loaded while one is computed.
    for row in tl.range(program, num_rows, programs, num_stages=2):
        at = row * stride + column
        gradient = tl.load(normed_grad + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row)
        unit = tl.where(inside, (value - tl.load(mean + row)) * scale, 0.0)
        gain_sum += gradient * unit
        shift_sum += gradient
        gradient *= gain
        along = tl.sum(gradient * unit, axis=0) / WIDTH
        common = tl.sum(gradient, axis=0) / WIDTH
        result = (gradient - along * unit - common) * scale
        if HAS_TOTAL_GRAD:
            result += tl.load(total_grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(states_grad + at, result.to(states_grad.dtype.element_ty), mask=inside)
        if DROPS:
            result = tl.where(_is_dropped(key, row, threshold, WIDTH, BLOCK), 0.0, result * left)
            tl.store(update_grad + at, result.to(update_grad.dtype.element_ty), mask=inside)
        if SHIFTS:
            update_shift_sum += result
    at = program * WIDTH + column
    tl.store(partial + at, gain_sum, mask=inside)
    tl.store(partial + programs * WIDTH + at, shift_sum, mask=inside)
    if SHIFTS:
        tl.store(partial + 2 * programs * WIDTH + at, update_shift_sum, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def activation_forward(
    inner, bias, outer, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_QUICK: tl.constexpr,
):  # fmt: skip
    """Compute GELU(W x + b) from the matmul W x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if IS_QUICK:  # noqa: SIM108
        result = value * tl.sigmoid(value * _QUICK)
    else:
        result = 0.5 * value * (1.0 + tl.erf(value * _ROOT_HALF))
    tl.store(outer + at, result.to(outer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def activation_backward(
    outer_grad, inner, bias, inner_grad, partial, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_QUICK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of W x, and its partial sums over rows: the gradient of the bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    shift = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & is_column[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        value = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32) + shift
        gradient = tl.load(outer_grad + at, mask=inside, other=0.0).to(tl.float32)
        if IS_QUICK:
            sigmoid = tl.sigmoid(value * _QUICK)
            slope = sigmoid * (1.0 + value * _QUICK * (1.0 - sigmoid))
        else:
            slope = 0.5 * (1.0 + tl.erf(value * _ROOT_HALF)) + value * _DENSITY * tl.exp(-0.5 * value * value)
        gradient *= slope
        tl.store(inner_grad + at, gradient.to(inner_grad.dtype.element_ty), mask=inside)
        sums += gradient
    tl.store(partial + program * WIDTH + column, tl.sum(sums, axis=0), mask=is_column)


@triton.jit(do_not_specialize=["num_rows"])
def join(
    first, second, third, joined, partial, num_rows,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write two or three matrices next to each other, and the partial sums of their rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    part = tl.program_id(1) // (WIDTH // COLUMNS)
    column = (tl.program_id(1) % (WIDTH // COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
    source = first
    if part == 1:
        source = second
    if part == 2:
        source = third
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), programs):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = row < num_rows
        value = tl.load(source + row * WIDTH + column[None, :], mask=inside, other=0.0)
        tl.store(joined + row * (PARTS * WIDTH) + part * WIDTH + column[None, :], value, mask=inside)
        sums += value.to(tl.float32)
    tl.store(partial + (program * PARTS + part) * WIDTH + column, tl.sum(sums, axis=0))


@triton.jit
def take_forward(
    states, index, taken, row_stride, position_stride, num_positions,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Copy rows of states by index."""
    row = tl.program_id(0).to(tl.int64)
    position, column = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, BLOCK)
    inside = (position < num_positions)[:, None] & (column < WIDTH)[None, :]
    source = states + tl.load(index + row) * row_stride + position[:, None] * position_stride + column[None, :]
    to = taken + (row * num_positions + position[:, None]) * WIDTH + column[None, :]
    tl.store(to, tl.load(source, mask=inside, other=0.0), mask=inside)


@triton.jit
def take_backward(
    gradient, order, start, states_grad, num_positions,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the readers of each row, in the given order."""
    shared = tl.program_id(0).to(tl.int64)
    position, column = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, BLOCK)
    inside = (position < num_positions)[:, None] & (column < WIDTH)[None, :]
    at = position[:, None] * WIDTH + column[None, :]
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for reader in range(tl.load(start + shared), tl.load(start + shared + 1)):
        row = gradient + tl.load(order + reader) * num_positions * WIDTH
        total += tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    to = states_grad + shared * num_positions * WIDTH + at
    tl.store(to, total.to(states_grad.dtype.element_ty), mask=inside)
