"""The operations on a CPU: torch's, with dropout and attention done in ways that are faster there.

Shapes: R rows, H heads, Q queries, K keys, d width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from bridgetower.kernels.dropout import draw_dropped, drop, zero_dropped
from bridgetower.kernels.torch_ops import TorchOps

# Torch's fused attention computes bfloat16 without matrix units by converting tiles of keys. With so few keys its
# backward pass takes 3 to 6 times as long as attention written as matmuls; with more it is the faster one (EPYC with
# avx512_bf16, torch 2.14: 17 keys 15.5 against 2.4 ms, 325 keys 73 against 85 ms).
_FEW_KEYS = 128


class CpuOps(TorchOps):
    """Torch on a CPU.

    Torch's dropout draws a double per element and keeps a mask of the states' type; ours draws 32 bits and keeps a
    byte. Torch's fused attention knows no dropout; what stands in for it computes in float32 and keeps the attention
    probabilities three times. Its backward pass does not use matrix units (AMX), which matmuls do.
    """

    def __init__(self, *, has_matrix_units: bool) -> None:
        """Choose how attention in bfloat16 is computed.

        Args:
            has_matrix_units: the CPU multiplies tiles of bfloat16 (AMX).
        """
        self._has_matrix_units = has_matrix_units
        self.name = "cpu with matrix units" if has_matrix_units else "cpu"

    def drop(self, states: Tensor, dropout: float) -> Tensor:
        """Return the states after dropout with a mask of bytes."""
        if states.device.type != "cpu":  # the meta device, on which operations are counted
            return super().drop(states, dropout)
        return drop(states, dropout)

    def attend_heads(
        self, query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor, mask_RK: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend by the fastest of four ways for these states."""
        if query_RHQd.device.type != "cpu":
            return super().attend_heads(query_RHQd, key_RHKd, value_RHKd, mask_RK, dropout)
        if dropout:
            dropped: Tensor = _DroppedAttention.apply(query_RHQd, key_RHKd, value_RHKd, mask_RK, dropout)
            return dropped
        parts = query_RHQd, key_RHKd, value_RHKd
        if query_RHQd.dtype != torch.bfloat16 or not _needs_gradient(parts):
            return super().attend_heads(*parts, mask_RK, dropout)
        if self._has_matrix_units and mask_RK is None and all(map(_is_readable, parts)):
            return torch.ops.bridgetower.attend(*parts)  # type: ignore[no-any-return]
        if self._has_matrix_units or key_RHKd.shape[2] < _FEW_KEYS:
            with sdpa_kernel(SDPBackend.MATH):
                return super().attend_heads(*parts, mask_RK, dropout)
        return super().attend_heads(*parts, mask_RK, dropout)


def has_matrix_units() -> bool:
    """Return True on a CPU with AMX tiles for bfloat16."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _needs_gradient(parts: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


def _is_readable(part_RHNd: Tensor) -> bool:
    """Return True for what the operator below reads: something, with the channels of a head side by side."""
    return part_RHNd.numel() > 0 and part_RHNd.stride(-1) == 1


@library.custom_op("bridgetower::attend", mutates_args=())
def _attend(query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor) -> Tensor:
    """Return torch's fused attention; the operator has a backward pass of its own."""
    return F.scaled_dot_product_attention(query_RHQd, key_RHKd, value_RHKd)


@_attend.register_fake
def _(query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor) -> Tensor:
    return _empty_like_projection(query_RHQd)


@library.custom_op("bridgetower::attend_backward", mutates_args=())
def _attend_backward(
    gradient_RHQd: Tensor, query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, by matmuls.

    One row at a time, so that its attention probabilities stay in the CPU's cache. Scores are rounded to bfloat16, as
    they are where attention is written as matmuls, so that the probabilities are the same.
    """
    query_grad, key_grad, value_grad = map(_empty_like_projection, (query_RHQd, key_RHKd, value_RHKd))
    scale = query_RHQd.shape[-1] ** -0.5
    for row, gradient_HQd in enumerate(gradient_RHQd):
        query_HQd, key_HKd = query_RHQd[row] * scale, key_RHKd[row]
        probability_HQK = (query_HQd @ key_HKd.transpose(1, 2)).softmax(dim=-1)
        probability_grad_HQK = gradient_HQd @ value_RHKd[row].transpose(1, 2)
        score_grad_HQK = torch._softmax_backward_data(probability_grad_HQK, probability_HQK, -1, probability_HQK.dtype)
        query_grad[row] = (score_grad_HQK @ key_HKd).mul_(scale)
        key_grad[row] = score_grad_HQK.transpose(1, 2) @ query_HQd
        value_grad[row] = probability_HQK.transpose(1, 2) @ gradient_HQd
    return query_grad, key_grad, value_grad


@_attend_backward.register_fake
def _(gradient_RHQd: Tensor, query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like_projection(query_RHQd), _empty_like_projection(key_RHKd), _empty_like_projection(value_RHKd)


def _empty_like_projection(heads_RHNd: Tensor) -> Tensor:
    """Return an empty tensor of such a shape in which the heads of a position lie side by side."""
    num_rows, heads, length, width = heads_RHNd.shape
    return heads_RHNd.new_empty(num_rows, length, heads, width).transpose(1, 2)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _go_back(ctx: Any, gradient_RHQd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.bridgetower.attend_backward(gradient_RHQd, *ctx.saved_tensors)
    return grads


_attend.register_autograd(_go_back, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.bridgetower.attend)
def _attend_flops(query: tuple[int, ...], key: tuple[int, ...], *shapes: Any, **settings: Any) -> int:
    """Return the operations of both matmuls, which torch's counter cannot see."""
    return 4 * math.prod(query) * key[2]


@register_flop_formula(torch.ops.bridgetower.attend_backward)
def _attend_backward_flops(
    grad: Any, query: tuple[int, ...], key: tuple[int, ...], *shapes: Any, **settings: Any
) -> int:
    """Return the operations of four matmuls; the scores, which are computed again, are not work."""
    return 8 * math.prod(query) * key[2]


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout that keeps the probabilities once, in the states' type, and a byte for each."""

    @staticmethod
    def forward(
        ctx: Any, query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor, mask_RK: Tensor | None, dropout: float
    ) -> Tensor:
        score_RHQK = (query_RHQd * query_RHQd.shape[-1] ** -0.5) @ key_RHKd.transpose(2, 3)
        if mask_RK is not None:
            # Not minus infinity: the softmax of a row without a key would be NaN.
            score_RHQK.masked_fill_(~mask_RK[:, None, None, :], torch.finfo(score_RHQK.dtype).min)
        probability_RHQK = score_RHQK.softmax(dim=-1)
        dropped_RHQK = draw_dropped(probability_RHQK.shape, dropout)
        ctx.save_for_backward(query_RHQd, key_RHKd, value_RHKd, probability_RHQK, dropped_RHQK)
        ctx.scale = 1.0 / (1.0 - dropout)
        # The few results are scaled, not the many probabilities. The scores' memory is free for what survives.
        surviving_RHQK = zero_dropped(probability_RHQK, dropped_RHQK, out=score_RHQK)
        return (surviving_RHQK @ value_RHKd).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_RHQd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_RHQd, key_RHKd, value_RHKd, probability_RHQK, dropped_RHQK = ctx.saved_tensors
        scale = query_RHQd.shape[-1] ** -0.5
        gradient_RHQd = gradient_RHQd * ctx.scale
        surviving_RHQK = zero_dropped(probability_RHQK, dropped_RHQK)
        value_grad_RHKd = surviving_RHQK.transpose(2, 3) @ gradient_RHQd
        probability_grad_RHQK = torch.matmul(gradient_RHQd, value_RHKd.transpose(2, 3), out=surviving_RHQK)
        probability_grad_RHQK.masked_fill_(dropped_RHQK, 0.0)
        score_grad_RHQK = torch._softmax_backward_data(
            probability_grad_RHQK, probability_RHQK, -1, probability_RHQK.dtype
        )
        query_grad_RHQd = (score_grad_RHQK @ key_RHKd) * scale
        key_grad_RHKd = score_grad_RHQK.transpose(2, 3) @ (query_RHQd * scale)
        return query_grad_RHQd, key_grad_RHKd, value_grad_RHKd, None, None
