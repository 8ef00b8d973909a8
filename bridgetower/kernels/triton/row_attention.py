"""Self-attention within rows of one length, with its projections, by Triton kernels; imported only with Triton.

Torch's FlashAttention pads 325 positions to 384, for queries and for keys. It returns three gradients, which have to be
concatenated for one matmul and summed for the bias. These kernels write the gradients where that matmul reads them, and
sum them on the way. With dropout FlashAttention is faster.

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
from bridgetower.kernels.triton.functions import linear_gradients

LONGEST = 512
"""Most positions of a row. On an H100, 145, 325 and 442 positions were faster than with FlashAttention; 197, and 577
and more, were slower."""
_TILE = 64
"""Queries, or keys, of one program: the same number for both, since both write to one table of partial sums."""
_TAIL = {"TAIL": 16, "num_warps": 4}
# Tile sizes and pipeline stages of each kernel: the fastest on an H100 at 325 positions.
FORWARD = {"QUERIES": _TILE, "KEYS": 64, "num_stages": 3, **_TAIL}
BACKWARD_OF_QUERIES = {"QUERIES": _TILE, "KEYS": 32, "num_stages": 3, **_TAIL}
BACKWARD_OF_KEYS = {"QUERIES": 32, "KEYS": _TILE, "num_stages": 3, **_TAIL}


class _RowAttention(torch.autograd.Function):
    """Projects and attends. Saves the states, their projections, the results and the log-sum-exp of each query."""

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
        states_grad, weight_grad = linear_gradients(joined_grad_RPE.flatten(0, 1), states_RPD, weight_ED, states_grad)
        return states_grad, weight_grad, partial.sum(dim=0).to(weight_ED.dtype), None


def supports(states_RPD: Tensor, num_heads: int, dropout: float) -> bool:
    """Return True if these kernels support such states and are the faster ones for them."""
    return (
        not dropout
        and states_RPD.dtype in (torch.bfloat16, torch.float16)
        and 0 < states_RPD.shape[1] <= LONGEST
        and states_RPD.shape[0] > 0
        and states_RPD.shape[2] in (width * num_heads for width in (16, 32, 64))
    )


def attend_within_rows(states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return x and what its positions attend to among each other, both of shape (R, P, D).

    Use the returned x from here on: the matmul that gives this layer's gradient of x then adds the other one for free.

    Args:
        weight_ED: joint projection to queries, keys and values.
        bias_E: its bias.
    """
    results: tuple[Tensor, Tensor] = _RowAttention.apply(states_RPD, weight_ED, bias_E, num_heads)
    return results
