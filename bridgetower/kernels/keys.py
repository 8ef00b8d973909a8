"""Random keys for kernels that draw their own dropout.

A kernel derives each random bit from a key and the position of the element, so that the backward pass draws the same
mask again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Key(NamedTuple):
    """The two numbers whose sum, modulo 2^64, is the key of a kernel's random bits."""

    word: Tensor
    """int64, one element, on the device: a CUDA graph reads it anew at each replay."""
    number: int
    """At least 2^32 where bits are drawn, so that Triton never specialises the kernel on a 32-bit value."""


class RecordedKeys:
    """Keys of a step that is captured once in a CUDA graph and replayed often."""

    def __init__(self, device: torch.device) -> None:
        """Start with a word of zero; ``draw`` sets it before each replay."""
        self._word, self._count = torch.zeros(1, dtype=torch.int64, device=device), 0

    def restart(self) -> None:
        """Begin with the first key again, so that a step's keys do not depend on what was captured before."""
        self._count = 0

    def next(self) -> Key:
        """Return a key that no other kernel of the step has."""
        self._count += 1
        return Key(self._word, 2**61 | _mix(self._count) >> 3)

    def draw(self) -> None:
        """Set the word for the next replay, from torch's generator."""
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
    """Return a new key, drawn from the seed and offset of torch's generator of the device.

    The host computes it without launching a kernel. Recomputed layers, for which torch resets the generator's offset,
    get the same key again.
    """
    if _recorded is not None:
        return _recorded.next()
    return Key(_zero(device), _draw_number(device))


def no_key(states: Tensor) -> Key:
    """Return a stand-in for a kernel that draws nothing and so never reads it."""
    return Key(states, 0)


def odds(dropout: float) -> tuple[int, float]:
    """Return the threshold below which a word of 32 random bits drops its element, and the scale of the survivors."""
    return round(dropout * 2**32), 1.0 / (1.0 - dropout)


@lru_cache
def _zero(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor is used in training, too
        return torch.zeros(1, dtype=torch.int64, device=device)


def _draw_number(device: torch.device) -> int:
    """Return 62 random bits, plus 2^62."""
    if device.type != "cuda":
        return 2**62 | int(torch.empty(1, dtype=torch.int64).random_(2**62))
    generator = torch.cuda.default_generators[device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    # Two rounds of SplitMix64 keep neighbouring seeds and offsets apart.
    return 2**62 | _mix(_mix(generator.initial_seed()) + offset) >> 2


def _mix(word: int) -> int:
    """Return SplitMix64 of a word."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31
