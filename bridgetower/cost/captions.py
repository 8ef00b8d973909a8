"""The captions of a micro-batch, as far as costs depend on them: their lengths."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import NamedTuple

# Standard deviation of the logarithm of a caption's length.
_LOG_LENGTH_DEVIATION = 0.4


class CaptionLengths(NamedTuple):
    """Lengths of the captions of a micro-batch."""

    num_tokens: tuple[int, ...]
    """Number of tokens of each caption, with <s> and </s>."""
    num_masked: tuple[int, ...]
    """Number of masked tokens of each caption."""


def typical_captions(num_pairs: int, mean_tokens: float, max_tokens: int, masked_fraction: float) -> CaptionLengths:
    """Return log-normal lengths, as the corpora have them, evenly spread over their distribution.

    Args:
        mean_tokens: with <s> and </s>.
        max_tokens: longer captions lose their end.
        masked_fraction: fraction of words that MLM masks.
    """
    normal = statistics.NormalDist(math.log(mean_tokens) - _LOG_LENGTH_DEVIATION**2 / 2, _LOG_LENGTH_DEVIATION)
    drawn = [math.exp(normal.inv_cdf((pair + 0.5) / num_pairs)) for pair in range(num_pairs)]
    # Lengths are differences of rounded sums, so that rounding keeps the mean; every caption has at least one word.
    lengths = [min(max_tokens, max(3, length)) for length in _whole_numbers(drawn)]
    masked = _whole_numbers([masked_fraction * (length - 2) for length in lengths])
    return CaptionLengths(tuple(lengths), tuple(masked))


def _whole_numbers(values: list[float]) -> list[int]:
    """Round values so that every running sum stays within one half of the exact one."""
    ends = [round(end) for end in itertools.accumulate(values)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
