"""The kernels of ``bridgetower.model.fused`` in Triton. To be imported only where there is Triton and a GPU for it.

Sums are in float32 whatever the states are. Dropout compares 32 random bits an element, by Philox from a seed that
torch's own generator of the device draws; the backward pass draws them again instead of keeping a mask.

Shapes: N rows (positions of all rows), D width, G programs; a program takes groups of four rows, as Philox gives four
words at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.autograd.function import once_differentiable

_ROWS_OF_GROUP = tl.constexpr(4)
_ROUNDS = tl.constexpr(7)  # of Philox: enough for every test of randomness that its authors know
_POSITIONS = 4  # of a tile of taken rows
# Programs of a kernel that sums over all rows, for each of the GPU's multiprocessors.
_PROGRAMS = 16
# Of a tile of the activations.
_TILE_ROWS, _TILE_COLUMNS = 16, 128
_QUICK = tl.constexpr(1.702)
_ROOT_HALF, _DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)  # sqrt(1/2), 1/sqrt(2 pi)


@triton.jit
def _is_dropped(words, place: tl.constexpr, threshold):
    if place == 0:
        word = words[0]
    elif place == 1:
        word = words[1]
    elif place == 2:
        word = words[2]
    else:
        word = words[3]
    return word.to(tl.uint32, bitcast=True).to(tl.int64) < threshold


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _norm_forward(
    states, update, update_bias, weight, bias, seed, total, normed, mean, inverse, num_rows, epsilon, threshold, left,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, SHIFTS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if SHIFTS:
        update_shift = tl.load(update_bias + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        words = tl.randint4x(tl.load(seed), group * WIDTH + column, n_rounds=_ROUNDS)
    for place in tl.static_range(_ROWS_OF_GROUP):
        row = group * _ROWS_OF_GROUP + place
        is_row = row < num_rows
        at = row.to(tl.int64) * WIDTH + column
        value = tl.load(states + at, mask=inside & is_row, other=0.0).to(tl.float32)
        if ADDS:
            added = tl.load(update + at, mask=inside & is_row, other=0.0).to(tl.float32)
            if SHIFTS:
                added += update_shift
            if DROPS:
                added = tl.where(_is_dropped(words, place, threshold), 0.0, added * left)
            # The backward pass sees the sum as it is kept, so the norm has to see the same.
            rounded = (value + added).to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside & is_row)
            value = rounded.to(tl.float32)
        center = tl.sum(value, axis=0) / WIDTH
        centered = tl.where(inside, value - center, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / WIDTH + epsilon)
        tl.store(mean + row, center, mask=is_row)
        tl.store(inverse + row, scale, mask=is_row)
        result = centered * scale * gain + shift
        tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside & is_row)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _norm_backward(
    normed_grad, total_grad, total, mean, inverse, weight, seed, states_grad, update_grad, partial,
    num_rows, threshold, left,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHIFTS: tl.constexpr, DROPS: tl.constexpr, HAS_TOTAL_GRAD: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    update_shift_sum = tl.zeros((BLOCK,), tl.float32)
    for group in range(program, tl.cdiv(num_rows, _ROWS_OF_GROUP), programs):
        if DROPS:
            words = tl.randint4x(tl.load(seed), group * WIDTH + column, n_rounds=_ROUNDS)
        for place in tl.static_range(_ROWS_OF_GROUP):
            row = group * _ROWS_OF_GROUP + place
            is_row = row < num_rows
            at = row.to(tl.int64) * WIDTH + column
            gradient = tl.load(normed_grad + at, mask=inside & is_row, other=0.0).to(tl.float32)
            value = tl.load(total + at, mask=inside & is_row, other=0.0).to(tl.float32)
            center = tl.load(mean + row, mask=is_row, other=0.0)
            scale = tl.load(inverse + row, mask=is_row, other=0.0)
            unit = tl.where(inside, (value - center) * scale, 0.0)
            gain_sum += gradient * unit
            shift_sum += gradient
            gradient *= gain
            along = tl.sum(gradient * unit, axis=0) / WIDTH
            common = tl.sum(gradient, axis=0) / WIDTH
            result = (gradient - along * unit - common) * scale
            if HAS_TOTAL_GRAD:
                result += tl.load(total_grad + at, mask=inside & is_row, other=0.0).to(tl.float32)
            result = tl.where(inside & is_row, result, 0.0)
            tl.store(states_grad + at, result.to(states_grad.dtype.element_ty), mask=inside & is_row)
            if DROPS:
                result = tl.where(_is_dropped(words, place, threshold), 0.0, result * left)
                tl.store(update_grad + at, result.to(update_grad.dtype.element_ty), mask=inside & is_row)
            if SHIFTS:
                update_shift_sum += result
    at = program * WIDTH + column
    tl.store(partial + at, gain_sum, mask=inside)
    tl.store(partial + programs * WIDTH + at, shift_sum, mask=inside)
    if SHIFTS:
        tl.store(partial + 2 * programs * WIDTH + at, update_shift_sum, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _activation_forward(
    inner, bias, outer, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_QUICK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if IS_QUICK:
        result = value * tl.sigmoid(value * _QUICK)
    else:
        result = 0.5 * value * (1.0 + tl.erf(value * _ROOT_HALF))
    tl.store(outer + at, result.to(outer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _activation_backward(
    outer_grad, inner, bias, inner_grad, partial, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_QUICK: tl.constexpr,
):  # fmt: skip
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
            share = tl.sigmoid(value * _QUICK)
            slope = share * (1.0 + value * _QUICK * (1.0 - share))
        else:
            slope = 0.5 * (1.0 + tl.erf(value * _ROOT_HALF)) + value * _DENSITY * tl.exp(-0.5 * value * value)
        gradient *= slope
        tl.store(inner_grad + at, gradient.to(inner_grad.dtype.element_ty), mask=inside)
        sums += gradient
    tl.store(partial + program * WIDTH + column, tl.sum(sums, axis=0), mask=is_column)


@triton.jit(do_not_specialize=["num_rows"])
def _join(
    first, second, third, joined, partial, num_rows,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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
def _take_forward(
    states, index, taken, row_stride, position_stride, num_positions,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position, column = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, BLOCK)
    inside = (position < num_positions)[:, None] & (column < WIDTH)[None, :]
    source = states + tl.load(index + row) * row_stride + position[:, None] * position_stride + column[None, :]
    to = taken + (row * num_positions + position[:, None]) * WIDTH + column[None, :]
    tl.store(to, tl.load(source, mask=inside, other=0.0), mask=inside)


@triton.jit
def _take_backward(
    gradient, order, start, states_grad, num_positions,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    shared = tl.program_id(0).to(tl.int64)
    position, column = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, BLOCK)
    inside = (position < num_positions)[:, None] & (column < WIDTH)[None, :]
    at = position[:, None] * WIDTH + column[None, :]
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for place in range(tl.load(start + shared), tl.load(start + shared + 1)):
        row = gradient + tl.load(order + place) * num_positions * WIDTH
        total += tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    to = states_grad + shared * num_positions * WIDTH + at
    tl.store(to, total.to(states_grad.dtype.element_ty), mask=inside)


class _Project(torch.autograd.Function):
    """x as it is, so that its gradients are added in the product that gives one of them, and parts of W x + b."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        return states.view_as(states), *F.linear(states, weight, bias).chunk(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, *part_grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        joined_NE, bias_grad = _joined([part.flatten(0, -2) for part in part_grads], ctx.has_bias)
        weight_grad = joined_NE.t() @ states.flatten(0, -2)
        if states_grad is None:
            grad_ND = joined_NE @ weight
        else:
            grad_ND = torch.addmm(states_grad.flatten(0, -2), joined_NE, weight)
        return grad_ND.view(states.shape), weight_grad, bias_grad, None


def _joined(parts: list[Tensor], sums: bool) -> tuple[Tensor, Tensor | None]:
    """Parts of equal width beside each other, and, if it is asked for, the sum of their rows."""
    num_rows, width = parts[0].shape
    if len(parts) == 1 or width % _TILE_COLUMNS or not 0 < num_rows:
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return joined, joined.sum(dim=0) if sums else None
    parts = [part.contiguous() for part in parts]
    joined = parts[0].new_empty(num_rows, len(parts) * width)
    columns = joined.shape[1] // _TILE_COLUMNS
    programs = max(1, min(triton.cdiv(num_rows, _TILE_ROWS), _programs(joined.device) // columns))
    partial = torch.empty(programs, joined.shape[1], dtype=torch.float32, device=joined.device)
    _join[programs, columns](*parts, *parts[:1] * (3 - len(parts)), joined, partial, num_rows, len(parts), **_tiles(width))
    return joined, partial.sum(dim=0).to(joined.dtype) if sums else None


class _Take(torch.autograd.Function):
    """Rows of states; the gradients of what is read more than once are added up in one order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
        num_shared, num_positions, width = states.shape
        if states.stride(2) != 1:
            states = states.contiguous()
        taken = states.new_empty(len(index_R), num_positions, width)
        grid = len(index_R), triton.cdiv(num_positions, _POSITIONS)
        _take_forward[grid](
            states, index_R, taken, states.stride(0), states.stride(1), num_positions,
            **_blocks(width), POSITIONS=_POSITIONS,
        )  # fmt: skip
        ctx.save_for_backward(order_R, start_Z)
        return taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        order_R, start_Z = ctx.saved_tensors
        _, num_positions, width = gradient.shape
        states_grad = gradient.new_empty(len(start_Z) - 1, num_positions, width)
        grid = len(states_grad), triton.cdiv(num_positions, _POSITIONS)
        _take_backward[grid](
            gradient.contiguous(), order_R, start_Z, states_grad, num_positions,
            **_blocks(width), POSITIONS=_POSITIONS,
        )  # fmt: skip
        return states_grad, None, None, None


class _Norm(torch.autograd.Function):
    """x as it is, and LN(x), so that both gradients are summed where they are at hand. Keeps x, and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        states = states.contiguous()
        _, normed, *kept = _norm(states, None, None, None, weight, bias, epsilon, 0.0)
        ctx.save_for_backward(states, *kept, weight)
        ctx.set_materialize_grads(False)
        return states.view_as(states), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, normed_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if normed_grad is None:
            return states_grad, None, None, None
        states_grad, _, (weight_grad, bias_grad) = _norm_gradients(
            normed_grad, states_grad, *ctx.saved_tensors, seed=None, shifts=False, dropout=0.0
        )
        return states_grad, weight_grad, bias_grad, None


class _AddNorm(torch.autograd.Function):
    """x + Dropout(u + b), and LN of that. Keeps the sum, and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        update: Tensor,
        update_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        # Torch's own generator, whose state recomputing goes back to; on the device, so that the host does not wait.
        seed = torch.empty(1, dtype=torch.int64, device=states.device)
        if dropout:
            seed.random_()
        states, update = states.contiguous(), update.contiguous()
        total, normed, *kept = _norm(states, update, update_bias, seed, weight, bias, epsilon, dropout)
        ctx.save_for_backward(total, *kept, weight)
        ctx.seed = seed
        ctx.settings = {"shifts": update_bias is not None, "dropout": dropout}
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor | None, normed_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if normed_grad is None:
            normed_grad = torch.zeros_like(ctx.saved_tensors[0])
        states_grad, update_grad, sums = _norm_gradients(
            normed_grad, total_grad, *ctx.saved_tensors, seed=ctx.seed, **ctx.settings
        )
        weight_grad, bias_grad, update_bias_grad = (*sums, None)[:3]
        return states_grad, update_grad, update_bias_grad, weight_grad, bias_grad, None, None


class _Activation(torch.autograd.Function):
    """GELU(h + b). Keeps h."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, bias: Tensor, is_quick: bool) -> Tensor:
        inner = inner.contiguous()
        width = inner.shape[-1]
        num_rows = inner.numel() // width
        outer = torch.empty_like(inner)
        if num_rows:
            grid = triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(width, _TILE_COLUMNS)
            _activation_forward[grid](inner, bias, outer, num_rows, **_tiles(width), IS_QUICK=is_quick)
        ctx.save_for_backward(inner, bias)
        ctx.is_quick = is_quick
        return outer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, bias = ctx.saved_tensors
        outer_grad = outer_grad.contiguous()
        width = inner.shape[-1]
        num_rows, columns = inner.numel() // width, triton.cdiv(width, _TILE_COLUMNS)
        inner_grad = torch.empty_like(inner)
        programs = max(1, min(triton.cdiv(num_rows, _TILE_ROWS), _programs(inner.device) // columns))
        partial = torch.empty(programs, width, dtype=torch.float32, device=inner.device)
        _activation_backward[programs, columns](
            outer_grad, inner, bias, inner_grad, partial, num_rows, **_tiles(width), IS_QUICK=ctx.is_quick
        )
        return inner_grad, partial.sum(dim=0).to(bias.dtype), None


def norm(states: Tensor, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x, and LN(x)."""
    found: tuple[Tensor, Tensor] = _Norm.apply(states, layer.weight, layer.bias, layer.eps)
    return found


def add_norm(
    states: Tensor, update: Tensor, update_bias: Tensor | None, layer: nn.LayerNorm, dropout: float
) -> tuple[Tensor, Tensor]:
    """x + Dropout(u + b), and LN of that."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(
        states, update, update_bias, layer.weight, layer.bias, layer.eps, dropout
    )
    return found


def project(states: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
    """x, and W x + b in equal parts."""
    found: tuple[Tensor, ...] = _Project.apply(states, weight, bias, parts)
    return found


def take(states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
    """Rows of states, as ``bridgetower.model.fused.take``."""
    taken: Tensor = _Take.apply(states, index_R, order_R, start_Z)
    return taken


def activate(inner: Tensor, bias: Tensor, is_quick: bool) -> Tensor:
    """GELU(h + b), or CLIP's quick one."""
    outer: Tensor = _Activation.apply(inner, bias, is_quick)
    return outer


def _norm(
    states: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, and for each row the mean and the inverse deviation."""
    width = states.shape[-1]
    num_rows = states.numel() // width
    total, normed = states if update is None else torch.empty_like(states), torch.empty_like(states)
    mean, inverse = torch.empty(2, num_rows, dtype=torch.float32, device=states.device)
    if num_rows:
        _norm_forward[(triton.cdiv(num_rows, 4),)](
            states, _or(update, states), _or(update_bias, bias), weight, bias, _or(seed, mean),
            total, normed, mean, inverse, num_rows, epsilon, *_odds(dropout),
            **_blocks(width), ADDS=update is not None, SHIFTS=update_bias is not None, DROPS=dropout > 0.0,
        )  # fmt: skip
    return total, normed, mean, inverse


def _norm_gradients(
    normed_grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    *,
    seed: Tensor | None,
    shifts: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of the states, of the update, of the norm's weight and bias, and, where it shifts, of the update's bias."""
    width, num_rows = total.shape[-1], mean.numel()
    normed_grad = normed_grad.contiguous()
    states_grad = torch.empty_like(total)
    update_grad = torch.empty_like(total) if dropout else states_grad
    programs = max(1, min(triton.cdiv(num_rows, 4), _programs(total.device)))
    partial = torch.empty(2 + shifts, programs, width, dtype=torch.float32, device=total.device)
    _norm_backward[(programs,)](
        normed_grad, normed_grad if total_grad is None else total_grad.contiguous(),
        total, mean, inverse, weight, _or(seed, mean), states_grad, update_grad, partial,
        num_rows, *_odds(dropout),
        **_blocks(width), SHIFTS=shifts, DROPS=dropout > 0.0, HAS_TOTAL_GRAD=total_grad is not None,
    )  # fmt: skip
    return states_grad, update_grad, partial.sum(dim=1).to(weight.dtype).unbind()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Another pointer in place of one that the kernel does not read."""
    return other if tensor is None else tensor


def _odds(dropout: float) -> tuple[int, float]:
    """Words below this are dropped, and what the others are multiplied by."""
    return round(dropout * 2**32), 1.0 / (1.0 - dropout)


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def _tiles(width: int) -> dict[str, int]:
    return {"WIDTH": width, "ROWS": _TILE_ROWS, "COLUMNS": _TILE_COLUMNS, "num_warps": 4}


@lru_cache
def _programs(device: torch.device) -> int:
    """Of a kernel that sums over all rows: enough to keep the device busy, few enough for their sums to be small."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return _PROGRAMS * int(processors)
