"""Autograd functions around the kernels of ``bridgetower.kernels.triton.layer_kernels``.

Imported only where Triton is installed. Each function spans all operations of a layer whose gradients can be computed
together, so that the host launches fewer kernels: a base step has about 2,500.

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

# Programs per multiprocessor of a kernel that sums over all rows. There are enough to keep the GPU busy, and few enough
# that their partial sums are cheap to add. A program of a norm is one warp, which needs most of its registers.
_PROGRAMS, _PROGRAMS_OF_NORMS = 16, 8
# Rows and columns of a tile of activations or joined projections, and positions per program of ``take``.
_TILE_ROWS, _TILE_COLUMNS = 16, 128
_TAKE_POSITIONS = 4

Gradients = tuple[Tensor | None, ...]


class _Norm(torch.autograd.Function):
    """LN(x). Saves x, and mean and inverse deviation per row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        states = states.contiguous()
        _, normed, *saved = _norm(states, None, None, gain, shift, epsilon)
        ctx.save_for_backward(states, *saved, gain)
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
    """LN(x + u). Saves the sum, and mean and inverse deviation per row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, update: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        total, normed, *saved = _norm(states.contiguous(), update.contiguous(), None, gain, shift, epsilon)
        ctx.save_for_backward(total, *saved, gain)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, normed_grad: Tensor) -> Gradients:
        states_grad, update_grad, (gain_grad, shift_grad) = _norm_gradients(normed_grad, None, *ctx.saved_tensors)
        return states_grad, update_grad, gain_grad, shift_grad, None


class _ProjectAddNorm(torch.autograd.Function):
    """S = x + Dropout(W h + b), and LN(s). Saves h, s, and mean and inverse deviation per row, but no dropout mask."""

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
        total, normed, *saved = _norm(states.contiguous(), update, bias, gain, shift, epsilon, dropout, key)
        ctx.save_for_backward(inner, weight, total, *saved, gain)
        ctx.dropout, ctx.key = dropout, key
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor | None, normed_grad: Tensor | None) -> Gradients:
        inner, weight, *saved = ctx.saved_tensors
        if normed_grad is None:
            normed_grad = torch.zeros_like(saved[0])
        states_grad, update_grad, (gain_grad, shift_grad, bias_grad) = _norm_gradients(
            normed_grad, total_grad, *saved, dropout=ctx.dropout, key=ctx.key, shifts=True
        )
        inner_grad, weight_grad = linear_gradients(update_grad.flatten(0, -2), inner, weight)
        return states_grad, inner_grad, weight_grad, bias_grad, gain_grad, shift_grad, None, None


class _Expand(torch.autograd.Function):
    """GELU(W x + b). Saves x and W x; the bias is added again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, is_quick: bool) -> tuple[Tensor, Tensor]:
        inner = F.linear(states, weight)
        num_rows, width = inner.numel() // inner.shape[-1], inner.shape[-1]
        outer = torch.empty_like(inner)
        if num_rows:
            grid = triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(width, _TILE_COLUMNS)
            kernels.activation_forward[grid](inner, bias, outer, num_rows, **_tile_constants(width), IS_QUICK=is_quick)
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
            outer_grad.contiguous(),
            inner,
            bias,
            inner_grad,
            partial,
            num_rows,
            **_tile_constants(width),
            IS_QUICK=ctx.is_quick,
        )
        states_grad, weight_grad = linear_gradients(inner_grad.flatten(0, -2), states, weight, states_grad)
        return states_grad, weight_grad, partial.sum(dim=0).to(bias.dtype), None


class _Project(torch.autograd.Function):
    """Projections of x that share one matmul. Saves x."""

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
        joined_NE, bias_grad = _concatenate_and_sum([part.flatten(0, -2) for part in parts])
        states_grad, weight_grad = linear_gradients(joined_NE, states, weight, states_grad)
        return states_grad, weight_grad, bias_grad, None


class _Take(torch.autograd.Function):
    """Rows of states by index. Saves the order in which gradients are summed, and no states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
        _, num_positions, width = states.shape
        if states.stride(2) != 1:
            states = states.contiguous()
        taken = states.new_empty(len(index_R), num_positions, width)
        kernels.take_forward[len(index_R), triton.cdiv(num_positions, _TAKE_POSITIONS)](
            states, index_R, taken, states.stride(0), states.stride(1), num_positions,
            **_block_constants(width), POSITIONS=_TAKE_POSITIONS,
        )  # fmt: skip
        ctx.save_for_backward(order_R, start_Z)
        return taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        order_R, start_Z = ctx.saved_tensors
        _, num_positions, width = gradient.shape
        states_grad = gradient.new_empty(len(start_Z) - 1, num_positions, width)
        kernels.take_backward[len(states_grad), triton.cdiv(num_positions, _TAKE_POSITIONS)](
            gradient.contiguous(), order_R, start_Z, states_grad, num_positions,
            **_block_constants(width), POSITIONS=_TAKE_POSITIONS,
        )  # fmt: skip
        return states_grad, None, None, None


def norm(states: Tensor, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x and LN(x).

    Use the returned x from here on, so that the backward kernel sums both gradients of x.

    Args:
        states: x, shape (..., D).
    """
    results: tuple[Tensor, Tensor] = _Norm.apply(states, layer.weight, layer.bias, layer.eps)
    return results


def add_norm(states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Return LN(x + u), shape (..., D)."""
    normed: Tensor = _AddNorm.apply(states, update, layer.weight, layer.bias, layer.eps)
    return normed


def project_add_norm(
    states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.LayerNorm, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return s = x + Dropout(W h + b), and LN(s), both of shape (..., D).

    Args:
        states: x, shape (..., D).
        inner: h, shape (..., width of h).
    """
    results: tuple[Tensor, Tensor] = _ProjectAddNorm.apply(
        states, inner, linear.weight, linear.bias, layer.weight, layer.bias, layer.eps, dropout
    )
    return results


def expand(states: Tensor, linear: nn.Linear, *, quick: bool) -> tuple[Tensor, Tensor]:
    """Return x, shape (..., D), and GELU(W x + b), shape (..., E).

    Use the returned x from here on: the matmul that gives this layer's gradient of x then adds the other one for free.

    Args:
        quick: CLIP's x * sigmoid(1.702 x) instead of GELU.
    """
    results: tuple[Tensor, Tensor] = _Expand.apply(states, linear.weight, linear.bias, quick)
    return results


def project(states: Tensor, weight: Tensor, bias: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Return x, and W x + b split along its width into projections of equal width.

    Use the returned x from here on: the matmul that gives this layer's gradient of x then adds the other one for free.

    Args:
        num_parts: number of projections that are stacked in ``weight``.
    """
    results: tuple[Tensor, ...] = _Project.apply(states, weight, bias, num_parts)
    return results


def take(states: Tensor, index_R: Tensor, order_R: Tensor, start_Z: Tensor) -> Tensor:
    """Return ``states[index_R]``; the gradients of a row that is read more than once are summed in a fixed order.

    Args:
        states: the rows that are read, shape (..., P, D).
        order_R: positions in ``index_R``, sorted by the row that they read.
        start_Z: where the readers of each row begin in ``order_R``, and the end of the last row's: one entry per row,
            plus one.
    """
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
    """Return the sum x + u, its norm, and mean and inverse deviation per row."""
    width, num_rows = states.shape[-1], states.numel() // states.shape[-1]
    total, normed = states if update is None else torch.empty_like(states), torch.empty_like(states)
    mean, inverse = torch.empty(2, num_rows, dtype=torch.float32, device=states.device)
    if num_rows:
        kernels.norm_forward[(num_rows,)](
            states, _or_unread(update, states), _or_unread(update_bias, shift), gain, shift, *(key or no_key(states)),
            total, normed, mean, inverse, epsilon, *odds(dropout),
            **_row_constants(width), ADDS=update is not None, SHIFTS=update_bias is not None, DROPS=dropout > 0.0,
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
    """Return the gradients of states, of update, and of (gain, shift), with ``shifts`` also of the update's bias."""
    width, num_rows = total.shape[-1], mean.numel()
    normed_grad = normed_grad.contiguous()
    states_grad = torch.empty_like(total)
    update_grad = torch.empty_like(total) if dropout else states_grad
    programs = max(1, min(num_rows, _PROGRAMS_OF_NORMS * _num_multiprocessors(total.device)))
    partial = torch.empty(2 + shifts, programs, width, dtype=torch.float32, device=total.device)
    kernels.norm_backward[(programs,)](
        normed_grad, normed_grad if total_grad is None else total_grad.contiguous(),
        total, mean, inverse, gain, *(key or no_key(total)), states_grad, update_grad, partial, num_rows,
        *odds(dropout),
        **_row_constants(width), SHIFTS=shifts, DROPS=dropout > 0.0, HAS_TOTAL_GRAD=total_grad is not None,
    )  # fmt: skip
    return states_grad, update_grad, partial.sum(dim=1).to(gain.dtype).unbind()


def linear_gradients(
    result_NE: Tensor, states: Tensor, weight_ED: Tensor, states_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and W, given the gradient of W x.

    Args:
        result_NE: gradient of W x.
        states_grad: gradient of x from its other readers, which is added.
    """
    weight_grad = result_NE.t() @ states.flatten(0, -2)
    if states_grad is None:
        return (result_NE @ weight_ED).view(states.shape), weight_grad
    return torch.addmm(states_grad.flatten(0, -2), result_NE, weight_ED).view(states.shape), weight_grad


def _concatenate_and_sum(parts_ND: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate gradients of equal width along the width. Returns: the result, and its sum over rows."""
    num_rows, width = parts_ND[0].shape
    if len(parts_ND) not in (2, 3) or width % _TILE_COLUMNS or not num_rows:
        joined = parts_ND[0] if len(parts_ND) == 1 else torch.cat(parts_ND, dim=-1)
        return joined, joined.sum(dim=0)
    parts_ND = [part.contiguous() for part in parts_ND]
    num_parts = len(parts_ND)
    joined = parts_ND[0].new_empty(num_rows, num_parts * width)
    programs, columns = _tile_grid(num_rows, num_parts * width, joined.device)
    partial = torch.empty(programs, num_parts * width, dtype=torch.float32, device=joined.device)
    three_parts = (parts_ND + parts_ND[:1] * 2)[:3]  # the kernel has three pointers, of which it may read two
    kernels.join[programs, columns](*three_parts, joined, partial, num_rows, num_parts, **_tile_constants(width))
    return joined, partial.sum(dim=0).to(joined.dtype)


def _or_unread(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a stand-in pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor


def _row_constants(width: int) -> dict[str, int]:
    """Return the constants of a program that holds whole rows: one warp, or more for rows wider than 1,024."""
    block = max(4, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, block // 1024)}


def _block_constants(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def _tile_constants(width: int) -> dict[str, int]:
    return {"WIDTH": width, "ROWS": _TILE_ROWS, "COLUMNS": _TILE_COLUMNS, "num_warps": 4}


def _tile_grid(num_rows: int, width: int, device: torch.device) -> tuple[int, int]:
    """Return the grid: programs that loop over the rows, and columns of tiles."""
    columns = triton.cdiv(width, _TILE_COLUMNS)
    return max(1, min(triton.cdiv(num_rows, _TILE_ROWS), _PROGRAMS * _num_multiprocessors(device) // columns)), columns


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, or 1 for a CPU, where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
