"""Attention by kernels that torch's own function does not have, so that little is computed for padding.

Torch's own attention knows rows of one length alone, so that packed texts have to be spread out to a grid and masked,
and its flash kernel takes no mask. Its kernel for rows of any length is not behind that function. Rows with a short
side, and without dropout those of images, have kernels of ours.

Shapes: T queries and S keys of all rows, R rows, P positions, D width, E three times D, H heads, d width of a head.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridgetower.kernels import ops as fused
from bridgetower.kernels.cpu import attend

_SMALLEST_TILE, _LARGEST_TILE = 16, 64


class Spans(NamedTuple):
    """Where each row stands among the tokens of all."""

    start_Z: Tensor
    """int32, R + 1 numbers: the first token of each row, and the end of the last."""
    longest: int
    covers: bool = True
    """Whether each token is of a row; tokens of none, at the end, attend to nothing and are given zeros."""


@cache  # recorded steps read them where they are
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


def tile(longest: int) -> int:
    """Of the short side's kernels, for a side with rows of so many tokens: a power of two that matrix units take."""
    return min(_LARGEST_TILE, max(_SMALLEST_TILE, 1 << max(0, longest - 1).bit_length()))


def takes_rooms(states: Tensor, num_heads: int, longest_query: int, longest_key: int) -> bool:
    """Whether attention of such states leaves tokens that are of no row alone, as the short side's kernels do.

    Args:
        states: with the heads of a token one after the other.
    """
    return fits(states, num_heads) and _is_short(states, states.shape[-1] // num_heads, longest_query, longest_key)


def _is_short(states: Tensor, width: int, longest_query: int, longest_key: int) -> bool:
    return fused.fits(states) and bool(_short().takes(longest_query, longest_key, width))


def _short() -> Any:
    """Imported where there is Triton alone."""
    return importlib.import_module("bridgetower.kernels.triton.short_attention")


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
    if kernels and _is_short(query_THd, query_THd.shape[-1], query_spans.longest, key_spans.longest):
        found: Tensor = _short().attend_short(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)
        return found
    assert query_spans.covers and key_spans.covers  # what it is not asked for it does not write
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


def takes_rows(states_RPD: Tensor, num_heads: int, dropout: float, *, kernels: bool) -> bool:
    """Whether positions of such rows attend to each other, with their projections, by kernels of ours."""
    # Compiled code, which fused.fits asks for first, cannot ask the rest.
    fit = kernels and fused.fits(states_RPD) and fits(states_RPD, num_heads)
    return fit and bool(_rows().takes(states_RPD, num_heads, dropout))


def attend_within_rows(
    states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int, dropout: float, *, kernels: bool
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of the positions of each row to each other.

    Args:
        weight_ED: projects to queries, keys and values.
        dropout: 0 when not training.

    Returns: x, for who goes on reading it, and what all heads attended to, both of shape (R, P, D).
    """
    if takes_rows(states_RPD, num_heads, dropout, kernels=kernels):
        found: tuple[Tensor, Tensor] = _rows().attend_within_rows(states_RPD, weight_ED, bias_E, num_heads)
        return found
    states_RPD, *parts = fused.project(states_RPD, weight_ED, bias_E, 3, kernels=kernels)
    query_RHPd, key_RHPd, value_RHPd = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
    return states_RPD, attend(query_RHPd, key_RHPd, value_RHPd, None, dropout).transpose(1, 2).flatten(2)


def _rows() -> Any:
    """Imported where there is Triton alone."""
    return importlib.import_module("bridgetower.kernels.triton.row_attention")
