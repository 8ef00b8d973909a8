"""Dropout, with what a CPU's own operators make slow taken another way; the distribution is the same everywhere."""

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


def without(states: Tensor, is_dropped: Tensor, out: Tensor | None = None) -> Tensor:
    """Zero where something is dropped."""
    return torch.where(is_dropped, states.new_zeros(()), states, out=out)


class _Dropout(torch.autograd.Function):
    """Keeps the mask alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, is_dropped: Tensor, left: float) -> Tensor:
        ctx.save_for_backward(is_dropped)
        ctx.left = left
        return without(states, is_dropped).mul_(left)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return without(gradient, *ctx.saved_tensors).mul_(ctx.left), None, None
