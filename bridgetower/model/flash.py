"""FlashAttention over rows of different lengths: one kernel, and nothing is spread out or computed for padding.

Torch's own attention knows rows of one length alone, so that packed texts have to be spread out to a grid and masked,
and its flash kernel takes no mask. Its kernel for rows of any length is not behind that function.

Shapes: T queries and S keys of all rows, R rows, H heads, d width of a head.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bridgetower.model import fused


class Spans(NamedTuple):
    """Where each row stands among the tokens of all."""

    start_Z: Tensor
    """int32, R + 1 numbers: the first token of each row, and the end of the last."""
    longest: int


@lru_cache(maxsize=64)
def even_spans(num_rows: int, length: int, device: torch.device) -> Spans:
    """Those of rows of one length."""
    with torch.inference_mode(False):  # they are kept, for training too
        return Spans(torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length, length)


def fits(states: Tensor, num_heads: int) -> bool:
    """Whether the kernel takes such states: those of an NVIDIA GPU since Ampere in half precision.

    ``torch.nn.attention.sdpa_kernel`` switches it off with torch's own flash kernel.
    """
    width = states.shape[-1] // num_heads
    return (
        states.is_cuda
        and states.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 256
        and torch.backends.cuda.flash_sdp_enabled()
        and fused.is_ampere_or_later(states.device)
    )


def attend_spans(
    query_THd: Tensor,
    key_SHd: Tensor,
    value_SHd: Tensor,
    query_spans: Spans,
    key_spans: Spans,
    dropout: float,
    *,
    kernels: bool,
) -> Tensor:
    """Scaled dot-product attention, each row's queries to its own keys, of which it has one; it may have no query.

    Args:
        dropout: of the shares; 0 when not training.
        kernels: whether rows of which one side is short may have kernels of their own.

    Returns: shape (T, H, d).
    """
    if kernels and fused.fits(query_THd):
        short = importlib.import_module("bridgetower.model.short_attention")
        if short.takes(query_spans.longest, key_spans.longest, query_THd.shape[-1]):
            found: Tensor = short.attend_short(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)
            return found
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
