"""The operations on NVIDIA GPUs: torch's, with FlashAttention for packed rows.

Torch's ``scaled_dot_product_attention`` reads rows of one length, so that packed rows have to be spread to a grid and
masked, and its flash kernel takes no mask. Its kernel for rows of any length stands behind it.

Shapes: T queries and S keys of all rows, R rows, D width, H heads, d width of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from bridgetower.kernels.layout import Layout, SharedRows, Spans, even_spans
from bridgetower.kernels.torch_ops import TorchOps


class FlashOps(TorchOps):
    """Torch on a GPU since Ampere; half precision alone goes through FlashAttention."""

    name = "flash attention"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_heads: int,
        dropout: float,
        *,
        query_layout: Layout | None = None,
        key_layout: Layout | None = None,
        sees_padding: bool = False,
    ) -> Tensor:
        """Attend without a grid, where a side is packed and nothing of it is padding."""
        layouts = [layout for layout in (query_layout, key_layout) if layout is not None]
        if not layouts or not all(layout.spans for layout in layouts) or not self.reads_spans(query, num_heads):
            return super().attend(
                query,
                key,
                value,
                num_heads,
                dropout,
                query_layout=query_layout,
                key_layout=key_layout,
                sees_padding=sees_padding,
            )
        attended_THd = self.attend_spans(
            _tokens(query, num_heads),
            _tokens(key, num_heads),
            _tokens(value, num_heads),
            _spans(query, query_layout),
            _spans(key, key_layout),
            dropout,
        )
        return attended_THd.view(query.shape)

    def attend_to_dense(
        self,
        states_TD: Tensor,
        context_NPD: Tensor,
        layers: tuple[nn.Linear, nn.Linear, nn.Linear],
        num_heads: int,
        dropout: float,
        *,
        layout: Layout,
        rows: SharedRows | None,
        absorb: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the projected context where the kernel reads the rows: it costs less than absorbing does."""
        absorb = absorb and not (layout.spans and self.reads_spans(states_TD, num_heads))
        return super().attend_to_dense(
            states_TD, context_NPD, layers, num_heads, dropout, layout=layout, rows=rows, absorb=absorb
        )

    def reads_spans(self, states: Tensor, num_heads: int) -> bool:
        """Return True if there is a kernel for packed rows of such states.

        ``torch.nn.attention.sdpa_kernel`` switches it off with torch's own flash kernel, as counting operations does.
        """
        width = states.shape[-1] // num_heads
        return (
            states.is_cuda
            and states.dtype in (torch.bfloat16, torch.float16)
            and width % 8 == 0
            and width <= 256
            and torch.backends.cuda.flash_sdp_enabled()
        )

    def attend_spans(
        self,
        query_THd: Tensor,
        key_SHd: Tensor,
        value_SHd: Tensor,
        query_spans: Spans,
        key_spans: Spans,
        dropout: float,
    ) -> Tensor:
        """Return scaled dot-product attention of each row's queries to its own keys, shape (T, H, d).

        ``torch.nn.attention.varlen`` offers the same kernel publicly, but without dropout (torch 2.14).

        Args:
            query_spans: a row may have no query.
            key_spans: every row has a key.
        """
        assert query_spans.covers and key_spans.covers  # the kernel leaves other tokens unwritten
        attended: Tensor = torch.ops.aten._flash_attention_forward(
            query_THd,
            key_SHd,
            value_SHd,
            query_spans.start_Z,
            key_spans.start_Z,
            query_spans.longest,
            key_spans.longest,
            dropout,
            False,  # not causal
            False,  # no mask for debugging
        )[0]
        return attended


@lru_cache
def is_ampere_or_later(device: torch.device) -> bool:
    """Return True for NVIDIA's GPUs with matrix units for bfloat16."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _tokens(states: Tensor, num_heads: int) -> Tensor:
    """Return the tokens of all rows one after the other, shape (T, H, d)."""
    tokens_TD = states if states.dim() == 2 else states.flatten(0, 1)
    tokens_THd: Tensor = tokens_TD.unflatten(-1, (num_heads, -1))
    return tokens_THd


def _spans(states: Tensor, layout: Layout | None) -> Spans:
    if layout is None:
        return even_spans(len(states), states.shape[1], states.device)
    assert layout.spans is not None
    return layout.spans
