"""Dropout, with what a CPU's own operators make slow taken another way; the distribution is the same everywhere.

Shapes: R rows, H heads, Q queries, N keys, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements whose masks are drawn at once, so that the words they come from stay in the CPU's cache.
_BLOCK = 2**18


def drop(states: Tensor, dropout: float, training: bool) -> Tensor:
    """As torch's dropout.

    On a CPU torch draws one number of double precision an element and keeps the mask in the states' type; here it is
    half a word of random bits, and a byte.
    """
    if not training or not dropout or states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(states, dropout, training)
    dropped: Tensor = _Dropout.apply(states, draw_dropped(states.shape, dropout), 1.0 / (1.0 - dropout))
    return dropped


def attend(query_RHQd: Tensor, key_RHNd: Tensor, value_RHNd: Tensor, mask_RN: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention with dropout of the shares.

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
    mask_R11N = None if mask_RN is None else mask_RN[:, None, None, :]
    return F.scaled_dot_product_attention(query_RHQd, key_RHNd, value_RHNd, attn_mask=mask_R11N, dropout_p=dropout)


def draw_dropped(shape: Sequence[int], dropout: float) -> Tensor:
    """True with the probability of dropout, to 2^-32, from torch's own generator of the CPU.

    Args:
        dropout: from 0 to below 1.
    """
    is_dropped = torch.empty(tuple(shape), dtype=torch.bool)
    words = torch.empty(min(_BLOCK, is_dropped.numel()) // 2 + 1, dtype=torch.int64)
    for block in is_dropped.view(-1).split(_BLOCK):
        halves = words.random_(-(2**63), None).view(torch.int32)  # all 64 bits
        torch.lt(halves[: len(block)], round(dropout * 2**32) - 2**31, out=block)
    return is_dropped


class Key(NamedTuple):
    """What a kernel draws its own random bits from: the sum of both, modulo 2^64."""

    word: Tensor
    """One, int64; on the device, so that a recorded step draws anew each time it is run."""
    number: int
    """Never fits into 32 bits where something is drawn, as Triton would compile a kernel anew for it."""


class RecordedKeys:
    """Keys of a step that is recorded once and run often."""

    def __init__(self, device: torch.device) -> None:
        """With a word that ``draw`` has yet to draw."""
        self._word, self._count = torch.zeros(1, dtype=torch.int64, device=device), 0

    def restart(self) -> None:
        """Begin with the first one again, so that those of a step do not depend on what was recorded before."""
        self._count = 0

    def next(self) -> Key:
        """Another one for each kernel of the step."""
        self._count += 1
        return Key(self._word, 2**61 | _mix(self._count) >> 3)

    def draw(self) -> None:
        """Draw the word, from torch's generator, for the step that is run next."""
        self._word.fill_(_draw_number(self._word.device) >> 1)


_recorded: RecordedKeys | None = None


@contextmanager
def recording(keys: RecordedKeys) -> Iterator[None]:
    """Inside, kernels get these keys, from the first one on."""
    global _recorded
    _recorded = keys
    keys.restart()
    try:
        yield
    finally:
        _recorded = None


def draw_key(device: torch.device) -> Key:
    """A key for a kernel, from torch's generator of the device.

    The host draws it from the generator's seed and place, without a kernel; recomputing, which takes the generator
    back, gets the same.
    """
    if _recorded is not None:
        return _recorded.next()
    return Key(_zero(device), _draw_number(device))


def no_key(states: Tensor) -> Key:
    """For a kernel that draws nothing, and so does not read it."""
    return Key(states, 0)


@lru_cache
def _zero(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, for training too
        return torch.zeros(1, dtype=torch.int64, device=device)


def _draw_number(device: torch.device) -> int:
    """62 random bits above 2^62."""
    if device.type != "cuda":
        return 2**62 | int(torch.empty(1, dtype=torch.int64).random_(2**62))
    generator = torch.cuda.default_generators[device.index]
    place = generator.get_offset()
    generator.set_offset(place + 4)
    # Two rounds of SplitMix64 keep seeds and places apart.
    return 2**62 | _mix(_mix(generator.initial_seed()) + place) >> 2


def odds(dropout: float) -> tuple[int, float]:
    """Words of 32 random bits below this are dropped, and the others' states are multiplied by that."""
    return round(dropout * 2**32), 1.0 / (1.0 - dropout)


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def _without(states: Tensor, is_dropped: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.where(is_dropped, states.new_zeros(()), states, out=out)


class _Dropout(torch.autograd.Function):
    """Keeps the mask alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, is_dropped: Tensor, left: float) -> Tensor:
        ctx.save_for_backward(is_dropped)
        ctx.left = left
        return _without(states, is_dropped).mul_(left)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _without(gradient, *ctx.saved_tensors).mul_(ctx.left), None, None


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
        left_RHQN = _without(share_RHQN, dropped_RHQN, out=score_RHQN)
        return (left_RHQN @ value_RHNd).mul_(ctx.left)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_RHQd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_RHQd, key_RHNd, value_RHNd, share_RHQN, dropped_RHQN = ctx.saved_tensors
        scale = query_RHQd.shape[-1] ** -0.5
        gradient_RHQd = gradient_RHQd * ctx.left
        left_RHQN = _without(share_RHQN, dropped_RHQN)
        value_grad_RHNd = left_RHQN.transpose(2, 3) @ gradient_RHQd
        share_grad_RHQN = torch.matmul(gradient_RHQd, value_RHNd.transpose(2, 3), out=left_RHQN)
        share_grad_RHQN.masked_fill_(dropped_RHQN, 0.0)
        score_grad_RHQN = torch._softmax_backward_data(share_grad_RHQN, share_RHQN, -1, share_RHQN.dtype)
        query_grad_RHQd = (score_grad_RHQN @ key_RHNd) * scale
        key_grad_RHNd = score_grad_RHQN.transpose(2, 3) @ (query_RHQd * scale)
        return query_grad_RHQd, key_grad_RHNd, value_grad_RHNd, None, None
