"""The parts of a layer as functions with gradients, by the kernels of ``bridgetower.kernels.triton.layer_kernels``.

Imported only where there is Triton. Each takes as much of a layer as its gradients have to do with each other, so that
the host has little to do for it: a step of base is two thousand launches.

Shapes: N positions of all rows, D width, E width inside a feed-forward, R rows, P positions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridgetower.kernels.keys import Key, draw_key, no_key, odds
from bridgetower.kernels.triton import layer_kernels as kernels

# Programs of a kernel that sums over all rows, for each of the GPU's multiprocessors: enough to keep them busy, few
# enough for their sums to be small. Those of norms have one warp, with most of the registers that it can have.
_PROGRAMS, _PROGRAMS_OF_NORMS = 16, 8
# Of a tile of the activations, and of rows that are read or joined.
_TILE_ROWS, _TILE_COLUMNS = 16, 128
_TAKEN_POSITIONS = 4

Gradients = tuple[Tensor | None, ...]


class _Norm(torch.autograd.Function):
    """Keeps x, and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        states = states.contiguous()
        _, normed, *kept = _norm(states, None, None, gain, shift, epsilon)
        ctx.save_for_backward(states, *kept, gain)
        ctx.set_materialize_grads(False)
        return states.view_as(states), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, normed_grad: Tensor | None) -> Gradients:
        if normed_grad is None:
            return states_grad, None, None, None
        states_grad, _, (gain_grad, shift_grad) = _norm_gradients(normed_grad, states_grad, *ctx.saved_tensors)
        return states_grad, gain_grad, shift_grad, None


class _AddNorm(torch.autograd.Function):
    """Keeps the sum, and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, update: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        total, normed, *kept = _norm(states.contiguous(), update.contiguous(), None, gain, shift, epsilon)
        ctx.save_for_backward(total, *kept, gain)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, normed_grad: Tensor) -> Gradients:
        states_grad, update_grad, (gain_grad, shift_grad) = _norm_gradients(normed_grad, None, *ctx.saved_tensors)
        return states_grad, update_grad, gain_grad, shift_grad, None


class _ProjectAddNorm(torch.autograd.Function):
    """Keeps what is projected, the sum, and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        inner: Tensor,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        epsilon: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        key = draw_key(states.device) if dropout else None
        update = F.linear(inner, weight)
        total, normed, *kept = _norm(states.contiguous(), update, bias, gain, shift, epsilon, dropout, key)
        ctx.save_for_backward(inner, weight, total, *kept, gain)
        ctx.dropout, ctx.key = dropout, key
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor | None, normed_grad: Tensor | None) -> Gradients:
        inner, weight, *kept = ctx.saved_tensors
        if normed_grad is None:
            normed_grad = torch.zeros_like(kept[0])
        states_grad, update_grad, (gain_grad, shift_grad, bias_grad) = _norm_gradients(
            normed_grad, total_grad, *kept, dropout=ctx.dropout, key=ctx.key, shifts=True
        )
        inner_grad, weight_grad = product_gradients(update_grad.flatten(0, -2), inner, weight)
        return states_grad, inner_grad, weight_grad, bias_grad, gain_grad, shift_grad, None, None


class _Expand(torch.autograd.Function):
    """Keeps x and W x."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, is_quick: bool) -> tuple[Tensor, Tensor]:
        inner = F.linear(states, weight)
        num_rows, width = inner.numel() // inner.shape[-1], inner.shape[-1]
        outer = torch.empty_like(inner)
        if num_rows:
            grid = triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(width, _TILE_COLUMNS)
            kernels.activation_forward[grid](inner, bias, outer, num_rows, **_tiles(width), IS_QUICK=is_quick)
        ctx.save_for_backward(states, weight, bias, inner)
        ctx.is_quick = is_quick
        ctx.set_materialize_grads(False)
        return states.view_as(states), outer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, outer_grad: Tensor | None) -> Gradients:
        if outer_grad is None:
            return states_grad, None, None, None
        states, weight, bias, inner = ctx.saved_tensors
        num_rows, width = inner.numel() // inner.shape[-1], inner.shape[-1]
        inner_grad = torch.empty_like(inner)
        programs, columns = _tile_grid(num_rows, width, inner.device)
        partial = torch.empty(programs, width, dtype=torch.float32, device=inner.device)
        kernels.activation_backward[programs, columns](
            outer_grad.contiguous(), inner, bias, inner_grad, partial, num_rows, **_tiles(width), IS_QUICK=ctx.is_quick
        )
        states_grad, weight_grad = product_gradients(inner_grad.flatten(0, -2), states, weight, states_grad)
        return states_grad, weight_grad, partial.sum(dim=0).to(bias.dtype), None


class _Project(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(states, weight)
        ctx.set_materialize_grads(False)
        return states.view_as(states), *F.linear(states, weight, bias).chunk(num_parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, *part_grads: Tensor | None) -> Gradients:
        states, weight = ctx.saved_tensors
        shape = *states.shape[:-1], len(weight) // len(part_grads)
        parts = [states.new_zeros(shape) if part is None else part for part in part_grads]
        joined_NE, bias_grad = _joined([part.flatten(0, -2) for part in parts])
        states_grad, weight_grad = product_gradients(joined_NE, states, weight, states_grad)
        return states_grad, weight_grad, bias_grad, None


class _Take(torch.autograd.Function):
    """Keeps none of the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
        _, num_positions, width = states.shape
        if states.stride(2) != 1:
            states = states.contiguous()
        taken = states.new_empty(len(index_R), num_positions, width)
        kernels.take_forward[len(index_R), triton.cdiv(num_positions, _TAKEN_POSITIONS)](
            states, index_R, taken, states.stride(0), states.stride(1), num_positions,
            **_blocks(width), POSITIONS=_TAKEN_POSITIONS,
        )  # fmt: skip
        ctx.save_for_backward(order_R, start_Z)
        return taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        order_R, start_Z = ctx.saved_tensors
        _, num_positions, width = gradient.shape
        states_grad = gradient.new_empty(len(start_Z) - 1, num_positions, width)
        kernels.take_backward[len(states_grad), triton.cdiv(num_positions, _TAKEN_POSITIONS)](
            gradient.contiguous(), order_R, start_Z, states_grad, num_positions,
            **_blocks(width), POSITIONS=_TAKEN_POSITIONS,
        )  # fmt: skip
        return states_grad, None, None, None


def norm(states: Tensor, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """X as it is, so that both gradients are added where they are at hand, and LN(x)."""
    found: tuple[Tensor, Tensor] = _Norm.apply(states, layer.weight, layer.bias, layer.eps)
    return found


def add_norm(states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
    """LN(x + u)."""
    normed: Tensor = _AddNorm.apply(states, update, layer.weight, layer.bias, layer.eps)
    return normed


def project_add_norm(
    states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.LayerNorm, dropout: float
) -> tuple[Tensor, Tensor]:
    """X + Dropout(W h + b), and LN of that."""
    found: tuple[Tensor, Tensor] = _ProjectAddNorm.apply(
        states, inner, linear.weight, linear.bias, layer.weight, layer.bias, layer.eps, dropout
    )
    return found


def expand(states: Tensor, linear: nn.Linear, *, quick: bool) -> tuple[Tensor, Tensor]:
    """X as it is, so that its gradients are added in the product that gives one of them, and GELU(W x + b)."""
    found: tuple[Tensor, Tensor] = _Expand.apply(states, linear.weight, linear.bias, quick)
    return found


def project(states: Tensor, weight: Tensor, bias: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """X as it is, so that its gradients are added in the product that gives one of them, and W x + b in parts."""
    found: tuple[Tensor, ...] = _Project.apply(states, weight, bias, num_parts)
    return found


def take(states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
    """Rows of states, whose gradients are added up in one order."""
    taken: Tensor = _Take.apply(states, index_R, order_R, start_Z)
    return taken


def _norm(
    states: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    dropout: float = 0.0,
    key: Key | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, and for each row the mean and the inverse deviation."""
    width, num_rows = states.shape[-1], states.numel() // states.shape[-1]
    total, normed = states if update is None else torch.empty_like(states), torch.empty_like(states)
    mean, inverse = torch.empty(2, num_rows, dtype=torch.float32, device=states.device)
    if num_rows:
        kernels.norm_forward[(num_rows,)](
            states, _or(update, states), _or(update_bias, shift), gain, shift, *(key or no_key(states)),
            total, normed, mean, inverse, epsilon, *odds(dropout),
            **_row_of(width), ADDS=update is not None, SHIFTS=update_bias is not None, DROPS=dropout > 0.0,
        )  # fmt: skip
    return total, normed, mean, inverse


def _norm_gradients(
    normed_grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    mean: Tensor,
    inverse: Tensor,
    gain: Tensor,
    *,
    dropout: float = 0.0,
    key: Key | None = None,
    shifts: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of states and update, and of the norm's gain and shift, and, where it shifts, of the update's bias."""
    width, num_rows = total.shape[-1], mean.numel()
    normed_grad = normed_grad.contiguous()
    states_grad = torch.empty_like(total)
    update_grad = torch.empty_like(total) if dropout else states_grad
    programs = max(1, min(num_rows, _PROGRAMS_OF_NORMS * _processors(total.device)))
    partial = torch.empty(2 + shifts, programs, width, dtype=torch.float32, device=total.device)
    kernels.norm_backward[(programs,)](
        normed_grad, normed_grad if total_grad is None else total_grad.contiguous(),
        total, mean, inverse, gain, *(key or no_key(total)), states_grad, update_grad, partial, num_rows,
        *odds(dropout),
        **_row_of(width), SHIFTS=shifts, DROPS=dropout > 0.0, HAS_TOTAL_GRAD=total_grad is not None,
    )  # fmt: skip
    return states_grad, update_grad, partial.sum(dim=1).to(gain.dtype).unbind()


def product_gradients(
    result_NE: Tensor, states: Tensor, weight_ED: Tensor, states_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, that of its other readers included, and of W, from that of W x."""
    weight_grad = result_NE.t() @ states.flatten(0, -2)
    if states_grad is None:
        return (result_NE @ weight_ED).view(states.shape), weight_grad
    return torch.addmm(states_grad.flatten(0, -2), result_NE, weight_ED).view(states.shape), weight_grad


def _joined(parts_ND: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts of equal width beside each other, and the sum of their rows."""
    num_rows, width = parts_ND[0].shape
    if len(parts_ND) not in (2, 3) or width % _TILE_COLUMNS or not num_rows:
        joined = parts_ND[0] if len(parts_ND) == 1 else torch.cat(parts_ND, dim=-1)
        return joined, joined.sum(dim=0)
    parts_ND = [part.contiguous() for part in parts_ND]
    num_parts = len(parts_ND)
    joined = parts_ND[0].new_empty(num_rows, num_parts * width)
    programs, columns = _tile_grid(num_rows, num_parts * width, joined.device)
    partial = torch.empty(programs, num_parts * width, dtype=torch.float32, device=joined.device)
    three = (parts_ND + parts_ND[:1] * 2)[:3]
    kernels.join[programs, columns](*three, joined, partial, num_rows, num_parts, **_tiles(width))
    return joined, partial.sum(dim=0).to(joined.dtype)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Another pointer in place of one that the kernel does not read."""
    return other if tensor is None else tensor


def _row_of(width: int) -> dict[str, int]:
    """For a program that has whole rows: a warp, unless rows are wide."""
    block = max(4, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, block // 1024)}


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def _tiles(width: int) -> dict[str, int]:
    return {"WIDTH": width, "ROWS": _TILE_ROWS, "COLUMNS": _TILE_COLUMNS, "num_warps": 4}


def _tile_grid(num_rows: int, width: int, device: torch.device) -> tuple[int, int]:
    """Programs that go through the rows, and columns of tiles."""
    columns = triton.cdiv(width, _TILE_COLUMNS)
    return max(1, min(triton.cdiv(num_rows, _TILE_ROWS), _PROGRAMS * _processors(device) // columns)), columns


@lru_cache
def _processors(device: torch.device) -> int:
    """A GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
