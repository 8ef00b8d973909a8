"""The operations on NVIDIA GPUs by our own Triton kernels; imported only where Triton is installed.

Each kernel reads its inputs once, and sums the gradients of biases and of a norm's weights on the way. Torch's
operators read everything again for these sums.

Shapes: D width, E joint width of several projections, R rows, N shared rows, P positions, T packed tokens, H heads, d
width of a head.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from bridgetower.kernels.flash_ops import FlashOps
from bridgetower.kernels.layout import SharedRows, Spans
from bridgetower.kernels.torch_ops import joint_weights
from bridgetower.kernels.triton import functions, row_attention, short_attention

_WIDEST = 4096
"""Widest row that a kernel holds in registers."""


class TritonOps(FlashOps):
    """Our kernels wherever they support the states; elsewhere FlashAttention and torch's operators."""

    name = "triton"

    def supports(self, states: Tensor) -> bool:
        """Return True if the kernels support such states.

        Triton launches kernels on the current device. Autocast is not supported, since matmuls then have another type.
        """
        return (
            states.is_cuda
            and states.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and states.shape[-1] <= _WIDEST
            and not torch.is_autocast_enabled("cuda")
            and states.device.index == torch.cuda.current_device()
        )

    def norm(self, states: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x and LN(x)."""
        if _is_norm(layer) and self.supports(states):
            return functions.norm(states, layer)
        return super().norm(states, layer)

    def add_norm(self, states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
        """Return LN(x + u)."""
        if self.supports(states):
            return functions.add_norm(states, update, layer)
        return super().add_norm(states, update, layer)

    def project_add_norm(
        self, states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.Module, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Return s = x + Dropout(W h + b), and LN(s)."""
        if _is_norm(layer) and self.supports(states):
            return functions.project_add_norm(states, inner, linear, layer, dropout)
        return super().project_add_norm(states, inner, linear, layer, dropout)

    def project(self, states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Return x and its projections, in one matmul."""
        if not self.supports(states):
            return super().project(states, *layers)
        if len(layers) == 1:
            return functions.project(states, layers[0].weight, layers[0].bias, 1)
        return functions.project(states, *joint_weights(layers), len(layers))

    def activate(self, states: Tensor, linear: nn.Linear, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """Return x and its activation."""
        if self.supports(states):
            return functions.expand(states, linear, quick=quick)
        return super().activate(states, linear, quick=quick)

    def attend_within_rows(
        self, states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Project and attend in one function where the kernels for rows of one length are the faster ones."""
        if not self.supports(states_RPD):
            return super().attend_within_rows(states_RPD, weight_ED, bias_E, num_heads, dropout)
        if self.reads_spans(states_RPD, num_heads) and row_attention.supports(states_RPD, num_heads, dropout):
            return row_attention.attend_within_rows(states_RPD, weight_ED, bias_E, num_heads)
        states_RPD, query, key, value = functions.project(states_RPD, weight_ED, bias_E, 3)
        return states_RPD, self.attend(query, key, value, num_heads, dropout)

    def attend_spans(
        self,
        query_THd: Tensor,
        key_SHd: Tensor,
        value_SHd: Tensor,
        query_spans: Spans,
        key_spans: Spans,
        dropout: float,
    ) -> Tensor:
        """Attend by our kernels where one side is short, else by FlashAttention."""
        longest = query_spans.longest, key_spans.longest
        if self.supports(query_THd) and short_attention.supports(*longest, query_THd.shape[-1]):
            return short_attention.attend_short(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)
        return super().attend_spans(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)

    def share_rows(self, index_R: Tensor, states_NPD: Tensor) -> SharedRows:
        """Return the index with its sorted order, in which the kernel sums gradients."""
        if not self.supports(states_NPD):
            return super().share_rows(index_R, states_NPD)
        sorted_R, order_R = index_R.sort(stable=True)
        row_Z = torch.arange(len(states_NPD) + 1, device=index_R.device)
        return SharedRows(index_R, order_R, torch.searchsorted(sorted_R, row_Z))

    def take_rows(self, states_NPD: Tensor, rows: SharedRows) -> Tensor:
        """Return the row that each of R rows reads.

        The gradients of a row's readers are summed in one order, in float32. Torch's own sum on a GPU has no order,
        and rounds to the states' type at each addition.
        """
        if rows.order_R is None or rows.start_Z is None or not self.supports(states_NPD):
            return super().take_rows(states_NPD, rows)
        return functions.take(states_NPD, rows.index_R, rows.order_R, rows.start_Z)

    def supports_buckets(self, states: Tensor, num_heads: int, longest_query: int, longest_key: int) -> bool:
        """Return True if the kernels for short rows compute all attention of such states; they skip padded slots."""
        width = states.shape[-1] // num_heads
        return (
            self.reads_spans(states, num_heads)
            and self.supports(states)
            and short_attention.supports(longest_query, longest_key, width)
        )


def _is_norm(layer: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return True for the norms that the kernels compute: affine, with a bias."""
    return isinstance(layer, nn.LayerNorm) and layer.elementwise_affine and layer.bias is not None
