"""Random numbers that are a pure function of a key and a counter.

Order, masks and negatives must not depend on the number of ranks or workers, so nothing here has a state: each number
is computed from (seed, purpose, position). The generator is SplitMix64's finaliser (Steele, Lea, Flood: "Fast
splittable pseudorandom number generators", OOPSLA 2014), written in NumPy so that no library version changes a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MUL_1 = 0xBF58476D1CE4E5B9
_MUL_2 = 0x94D049BB133111EB
_ALL_BITS = 0xFFFFFFFFFFFFFFFF
_FEISTEL_ROUNDS = 6


def _mix(values: U64) -> U64:
    """Apply SplitMix64's finaliser, a bijection of 64-bit integers.

    Args:
        values: with at least one axis, since NumPy warns about overflow of scalars but not of arrays.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MUL_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MUL_2)
    return values ^ (values >> np.uint64(31))


def _mix_one(value: int) -> int:
    """Apply SplitMix64's finaliser to one integer, ten times as fast as ``_mix`` does to an array of one."""
    value = ((value ^ (value >> 30)) * _MUL_1) & _ALL_BITS
    value = ((value ^ (value >> 27)) * _MUL_2) & _ALL_BITS
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def hash64(data: str | bytes) -> int:
    """Return a 64-bit hash of a text; unlike Python's ``hash`` it is the same on every machine."""
    raw = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def key(*parts: int | str) -> int:
    """Return the 64-bit key of a stream of numbers, from a seed, a purpose and whatever else identifies the stream."""
    state = 0
    for part in parts:
        word = hash64(part) if isinstance(part, str) else int(part) & _ALL_BITS
        state = _mix_one(((state + _GOLDEN) & _ALL_BITS) ^ _mix_one(word))
    return state


def keys(stream: int, texts: Sequence[str]) -> U64:
    """Return ``key(stream, text)`` for each text, vectorised."""
    words = np.array([hash64(text) for text in texts], np.uint64)
    state = (key(stream) + _GOLDEN) & _ALL_BITS
    return _mix(np.uint64(state) ^ _mix(words))


def bits(stream: int | U64, counters: npt.ArrayLike) -> U64:
    """Return 64 random bits per counter. The bits of different counters differ, so each can be the key of a new stream.

    Args:
        stream: one key, or an array of keys that broadcasts against ``counters``.
    """
    counts = np.asarray(counters).astype(np.uint64)
    stream_key = np.asarray(stream, dtype=np.uint64)
    shape = np.broadcast_shapes(counts.shape, stream_key.shape)
    mixed = _mix(_mix(np.atleast_1d(counts) * np.uint64(_GOLDEN) + stream_key) ^ stream_key)
    return mixed.reshape(shape)


def uniform(stream: int | U64, counters: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) per counter, with 53 random bits."""
    return (bits(stream, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(stream: int | U64, counters: npt.ArrayLike, bound: npt.ArrayLike) -> I64:
    """Return an integer in [0, bound) per counter. Its bias is below bound / 2**53."""
    return (uniform(stream, counters) * np.asarray(bound, np.float64)).astype(np.int64)


def shuffled(stream: int, count: int) -> I64:
    """Return a permutation of ``range(count)``, in O(count log count) time and O(count) memory: for short lists."""
    return np.argsort(bits(stream, np.arange(count)), kind="stable").astype(np.int64)


def permute(stream: int | U64, numbers: npt.ArrayLike, count: int | I64) -> I64:
    """Apply a pseudo-random permutation of ``range(count)`` to each number, in O(1) memory.

    The permutation is a Feistel network over the next power of four. A number that lands outside the range goes through
    the network again until it lands inside (cycle walking), which keeps the map a bijection.

    Args:
        stream: one key for all numbers, or one per number.
        numbers: each in [0, count).
        count: size of the permutation, one for all numbers, or one per number.
    """
    values = np.asarray(numbers).astype(np.uint64)
    shape = values.shape
    values = values.ravel()
    limits = np.broadcast_to(np.asarray(count, np.uint64), shape).ravel()
    stream_keys = np.broadcast_to(np.asarray(stream, np.uint64), shape).ravel()
    sizes, size_of = np.unique(limits, return_inverse=True)
    # The smallest h with 4**h >= size: two halves of h bits each.
    half_bits = np.array([max(1, ((int(size) - 1).bit_length() + 1) // 2) for size in sizes], np.uint64)[size_of]
    result = np.empty_like(values)
    pending = np.arange(values.size)
    while pending.size:
        values_now = _feistel(values[pending], half_bits[pending], stream_keys[pending])
        is_inside = values_now < limits[pending]
        result[pending[is_inside]] = values_now[is_inside]
        values[pending] = values_now
        pending = pending[~is_inside]
    return result.astype(np.int64).reshape(shape)


def _feistel(values: U64, half_bits: U64, stream_keys: U64) -> U64:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_number in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (bits(stream_keys, right * np.uint64(16) + np.uint64(round_number)) & mask)
    return (left << half_bits) | right
