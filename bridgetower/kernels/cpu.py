"""Scaled dot-product attention, with what torch's own makes slow on a CPU taken another way.

Shapes: R rows, H heads, Q queries, N keys, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from bridgetower.kernels.dropout import draw_dropped, without

_HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Matrix units for bfloat16, which torch's products use, and the backward pass of its fused attention does not."""


def attend(query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor, mask_RN: Tensor | None, dropout: float) -> Tensor:
    """Attend, with dropout of the shares.

    Torch's fused attention of a CPU knows no dropout. What torch takes in its place computes in float32 whatever the
    states are, and keeps the shares three times.

    Args:
        mask_RN: True for keys that are seen; None: all.
        dropout: 0 when not training.

    Returns: shape (R, H, Q, d).
    """
    if dropout and query_RHQd.device.type == "cpu" and not torch.compiler.is_compiling():
        attended: Tensor = _DroppedAttention.apply(query_RHQd, key_RHNd, value_RHNd, mask_RN, dropout)
        return attended
    if mask_RN is None and not dropout and _is_for_matrix_units(query_RHQd, key_RHNd, value_RHNd):
        return torch.ops.bridgetower.attend(query_RHQd, key_RHNd, value_RHNd)  # type: ignore[no-any-return]
    mask_R11N = None if mask_RN is None else mask_RN[:, None, None, :]
    return F.scaled_dot_product_attention(query_RHQd, key_RHNd, value_RHNd, attn_mask=mask_R11N, dropout_p=dropout)


def _is_for_matrix_units(*parts: Tensor) -> bool:
    """Whether there is a backward pass that they are faster at."""
    return (
        _HAS_AMX
        and torch.is_grad_enabled()
        and any(part.requires_grad for part in parts)
        and all(
            part.device.type == "cpu" and part.dtype == torch.bfloat16 and part.numel() > 0 and part.stride(-1) == 1
            for part in parts
        )
        and (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled())  # the switch of sdpa_kernel
    )


@library.custom_op("bridgetower::attend", mutates_args=())
def _attend(query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor) -> Tensor:
    """Torch's fused forward pass."""
    return F.scaled_dot_product_attention(query_RHQd, key_RHNd, value_RHNd)


@_attend.register_fake
def _(query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor) -> Tensor:
    return _heads_beside(query_RHQd)


@library.custom_op("bridgetower::attend_backward", mutates_args=())
def _attend_backward(
    gradient_RHQd: Tensor, query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of a row at a time, so that its shares stay in the CPU's cache.

    Scores are rounded to bfloat16, as where attention is written as products, so that the shares are theirs.
    """
    query_grad, key_grad, value_grad = map(_heads_beside, (query_RHQd, key_RHNd, value_RHNd))
    scale = query_RHQd.shape[-1] ** -0.5
    for row, gradient_HQd in enumerate(gradient_RHQd):
        query_HQd, key_HNd = query_RHQd[row] * scale, key_RHNd[row]
        share_HQN = (query_HQd @ key_HNd.transpose(1, 2)).softmax(dim=-1)
        share_grad_HQN = gradient_HQd @ value_RHNd[row].transpose(1, 2)
        score_grad_HQN = torch._softmax_backward_data(share_grad_HQN, share_HQN, -1, share_HQN.dtype)
        query_grad[row] = (score_grad_HQN @ key_HNd).mul_(scale)
        key_grad[row] = score_grad_HQN.transpose(1, 2) @ query_HQd
        value_grad[row] = share_HQN.transpose(1, 2) @ gradient_HQd
    return query_grad, key_grad, value_grad


@_attend_backward.register_fake
def _(gradient_RHQd: Tensor, query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_beside(query_RHQd), _heads_beside(key_RHNd), _heads_beside(value_RHNd)


def _heads_beside(part_RHNd: Tensor) -> Tensor:
    """An empty tensor of such a shape, in which the heads of a position stand beside each other."""
    num_rows, heads, length, width = part_RHNd.shape
    return part_RHNd.new_empty(num_rows, length, heads, width).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _go_back(ctx: Any, gradient_RHQd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.bridgetower.attend_backward(gradient_RHQd, *ctx.saved_tensors)
    return grads


_attend.register_autograd(_go_back, setup_context=_keep)


class _DroppedAttention(torch.autograd.Function):
    """Keeps the shares once in the states' type, and a byte for each that says whether it was dropped."""

    @staticmethod
    def forward(
        ctx: Any, query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor, mask_RN: Tensor | None, dropout: float
    ) -> Tensor:
        score_RHQN = (query_RHQd * query_RHQd.shape[-1] ** -0.5) @ key_RHNd.transpose(2, 3)
        if mask_RN is not None:
            # Not minus infinity: a row without a key would be none of numbers.
            score_RHQN.masked_fill_(~mask_RN[:, None, None, :], torch.finfo(score_RHQN.dtype).min)
        share_RHQN = score_RHQN.softmax(dim=-1)
        dropped_RHQN = draw_dropped(share_RHQN.shape, dropout)
        ctx.save_for_backward(query_RHQd, key_RHNd, value_RHNd, share_RHQN, dropped_RHQN)
        ctx.left = 1.0 / (1.0 - dropout)
        # Scaled are the few results, not the many shares; scores are not needed any more, their memory is.
        left_RHQN = without(share_RHQN, dropped_RHQN, out=score_RHQN)
        return (left_RHQN @ value_RHNd).mul_(ctx.left)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_RHQd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_RHQd, key_RHNd, value_RHNd, share_RHQN, dropped_RHQN = ctx.saved_tensors
        scale = query_RHQd.shape[-1] ** -0.5
        gradient_RHQd = gradient_RHQd * ctx.left
        left_RHQN = without(share_RHQN, dropped_RHQN)
        value_grad_RHNd = left_RHQN.transpose(2, 3) @ gradient_RHQd
        share_grad_RHQN = torch.matmul(gradient_RHQd, value_RHNd.transpose(2, 3), out=left_RHQN)
        share_grad_RHQN.masked_fill_(dropped_RHQN, 0.0)
        score_grad_RHQN = torch._softmax_backward_data(share_grad_RHQN, share_RHQN, -1, share_RHQN.dtype)
        query_grad_RHQd = (score_grad_RHQN @ key_RHNd) * scale
        key_grad_RHNd = score_grad_RHQN.transpose(2, 3) @ (query_RHQd * scale)
        return query_grad_RHQd, key_grad_RHNd, value_grad_RHNd, None, None
