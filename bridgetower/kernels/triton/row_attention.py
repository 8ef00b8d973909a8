"""Attention of a row's positions to each other, with its projections, by kernels in Triton; imported only with Triton.

Torch's kernels pad 325 positions to 384, twice. They leave three gradients, which then have to be put beside each other
for one product, and be summed for a bias: here they are written where they are read, and their sums come on the way.
With dropout torch's are the faster ones.

Shapes: R rows, P positions, D width, H heads, E three times D: queries, keys and values beside each other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridgetower.kernels.triton import row_attention_kernels as kernels
from bridgetower.kernels.triton.functions import product_gradients

LONGEST = 512
"""Positions. On an H100, 145, 325 and 442 were faster than torch's; 197, and 577 and more, slower."""
_TILE = 64
"""Queries, or keys, of a program: as many for both, as their sums stand beside each other."""
_TAIL = {"TAIL": 16, "num_warps": 4}
# How many go by at a time, and are on their way meanwhile: measured on an H100 at 325 positions.
FORWARD = {"QUERIES": _TILE, "KEYS": 64, "num_stages": 3, **_TAIL}
BACKWARD_OF_QUERIES = {"QUERIES": _TILE, "KEYS": 32, "num_stages": 3, **_TAIL}
BACKWARD_OF_KEYS = {"QUERIES": 32, "KEYS": _TILE, "num_stages": 3, **_TAIL}


class _RowAttention(torch.autograd.Function):
    """Keeps what is projected, the projections, the results and a number for each query."""

    @staticmethod
    def forward(
        ctx: Any, states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor]:
        num_rows, length, width = states_RPD.shape
        joined_RPE = F.linear(states_RPD, weight_ED, bias_E)
        attended_RPD = torch.empty_like(states_RPD, memory_format=torch.contiguous_format)
        log_sum_RHP = torch.empty(num_rows, num_heads, length, dtype=torch.float32, device=states_RPD.device)
        score_scale = (width // num_heads) ** -0.5
        ctx.scales = score_scale * math.log2(math.e), score_scale
        ctx.sizes = {"STRIDE": 3 * width, "HEADS": num_heads, "WIDTH": width // num_heads}
        kernels.rows_forward[(triton.cdiv(length, _TILE) * num_rows * num_heads,)](
            *joined_RPE.chunk(3, dim=-1), attended_RPD, log_sum_RHP, length, ctx.scales[0], **ctx.sizes, **FORWARD
        )
        ctx.save_for_backward(states_RPD, weight_ED, joined_RPE, attended_RPD, log_sum_RHP)
        ctx.set_materialize_grads(False)
        return states_RPD.view_as(states_RPD), attended_RPD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_grad: Tensor | None, gradient_RPD: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient_RPD is None:
            return states_grad, None, None, None
        states_RPD, weight_ED, joined_RPE, attended_RPD, log_sum_RHP = ctx.saved_tensors
        gradient_RPD = gradient_RPD.contiguous()
        num_rows, num_heads, length = log_sum_RHP.shape
        tiles = triton.cdiv(length, _TILE)
        grid = (tiles * num_rows * num_heads,)
        joined_grad_RPE, along_RHP = torch.empty_like(joined_RPE), torch.empty_like(log_sum_RHP)
        partial = torch.empty(num_rows * tiles, len(weight_ED), dtype=torch.float32, device=joined_RPE.device)
        parts = joined_RPE.chunk(3, dim=-1)
        query_grad, key_grad, value_grad = joined_grad_RPE.chunk(3, dim=-1)
        kernels.rows_backward_of_queries[grid](
            *parts, attended_RPD, log_sum_RHP, gradient_RPD, along_RHP, query_grad, partial,
            length, *ctx.scales, **ctx.sizes, **BACKWARD_OF_QUERIES,
        )  # fmt: skip
        kernels.rows_backward_of_keys[grid](
            *parts, log_sum_RHP, gradient_RPD, along_RHP, key_grad, value_grad, partial,
            length, *ctx.scales, **ctx.sizes, **BACKWARD_OF_KEYS,
        )  # fmt: skip
        states_grad, weight_grad = product_gradients(joined_grad_RPE.flatten(0, 1), states_RPD, weight_ED, states_grad)
        return states_grad, weight_grad, partial.sum(dim=0).to(weight_ED.dtype), None


def takes(states_RPD: Tensor, num_heads: int, dropout: float) -> bool:
    """Whether these kernels are for such states."""
    return (
        not dropout
        and states_RPD.dtype in (torch.bfloat16, torch.float16)
        and 0 < states_RPD.shape[1] <= LONGEST
        and states_RPD.shape[0] > 0
        and states_RPD.shape[2] in (width * num_heads for width in (16, 32, 64))
    )


def attend_within_rows(states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """X as it is, so that its gradients are added in a product, and what each head attended to, shape (R, P, D)."""
    found: tuple[Tensor, Tensor] = _RowAttention.apply(states_RPD, weight_ED, bias_E, num_heads)
    return found
