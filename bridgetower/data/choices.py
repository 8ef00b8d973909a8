"""The random choices of a micro-batch: which tokens are masked, and which image each caption is shown with.

All are pure functions of the seed and the positions of the pairs. Shapes: B pairs, L tokens, M masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower import rng
from bridgetower.data.text import Tokenizer

I64 = npt.NDArray[np.int64]

# RoBERTa and BERT: of the chosen tokens 80 % become <mask>, 10 % a random id, 10 % stay.
_MASK_SHARE = 0.8
_RANDOM_SHARE = 0.1


class MaskedTokens(NamedTuple):
    """Masked ids, and what is to be predicted."""

    ids_BL: I64
    index_M: I64
    """Flat index b * L + l of each token to predict."""
    label_M: I64
    """Its clean id."""


def mask_tokens(ids_BL: I64, counters_B: I64, tokenizer: Tokenizer, *, stream: int, probability: float) -> MaskedTokens:
    """Choose each ordinary token with ``probability`` and hide most of the chosen ones.

    Token-level, not whole words, as the published code does for RoBERTa. A caption may get no masked token.

    Args:
        ids_BL: clean ids, padded.
        counters_B: what the masks are a function of: positions of the stream.
        stream: key of the random numbers.
        probability: 0.15 in the paper.
    """
    tokens = np.arange(ids_BL.shape[1]) * 3
    key_B1 = rng.bits(stream, counters_B)[:, None]
    is_chosen_BL = (rng.uniform(key_B1, tokens) < probability) & ~tokenizer.is_special(ids_BL)
    index_M = np.flatnonzero(is_chosen_BL)
    row_M, column_M = np.divmod(index_M, ids_BL.shape[1])
    key_M, label_M = key_B1[row_M, 0], ids_BL.ravel()[index_M]
    fate_M = rng.uniform(key_M, tokens[column_M] + 1)
    random_M = rng.below(key_M, tokens[column_M] + 2, tokenizer.vocabulary_size)
    masked_ids_BL = ids_BL.copy()
    masked_ids_BL.ravel()[index_M] = np.where(
        fate_M < _MASK_SHARE,
        tokenizer.mask_id,
        np.where(fate_M < _MASK_SHARE + _RANDOM_SHARE, random_M, label_M),
    )
    return MaskedTokens(masked_ids_BL, index_M, label_M)


def mlm_weights(index_M: I64, num_tokens: int, num_pairs: int, group_size: int) -> npt.NDArray[np.float32]:
    """The weight of each masked token's loss: groups of pairs count equally, and tokens equally within a group.

    Args:
        num_tokens: L.
        num_pairs: B, a multiple of ``group_size``.
    """
    group_M = index_M // num_tokens // group_size
    num_groups = num_pairs // group_size
    tokens_per_group = np.bincount(group_M, minlength=num_groups)
    return (1.0 / (tokens_per_group[group_M] * num_groups)).astype(np.float32)


class ImageChoice(NamedTuple):
    """Which image each caption is shown with for ITM."""

    image_B: I64
    """Row of the micro-batch's images."""
    label_B: I64
    """1 where it is the caption's own."""


def choose_images(
    image_id_B: npt.NDArray[np.uint64], corpus_B: I64, positions_B: I64, *, seed: int, group_size: int
) -> ImageChoice:
    """Pair half of each group's captions with their own image and half with another's of the group.

    A negative never has the image id of the pair; it is of the same corpus where the group holds one (the published
    code draws within the corpus: images of another would be told apart by their style). A pair for which the group
    holds no other image stays a positive.

    Args:
        positions_B: consecutive positions of the stream that start at a multiple of ``group_size``.
    """
    image_B = np.arange(len(positions_B))
    label_B = np.ones(len(positions_B), np.int64)
    wants_negative_B = wants_negative(positions_B, seed=seed, group_size=group_size)
    for start in range(0, len(positions_B), group_size):
        rows = slice(start, start + group_size)
        group_key = _group_key(seed, int(positions_B[start]), group_size)
        is_other = image_id_B[rows, None] != image_id_B[None, rows]
        is_near = is_other & (corpus_B[rows, None] == corpus_B[None, rows])
        candidates = np.where(is_near.any(axis=1, keepdims=True), is_near, is_other)
        num_candidates = candidates.sum(axis=1)
        drawn = rng.below(rng.key(group_key, "image"), np.arange(group_size), num_candidates)
        # The column where the running count of candidates first exceeds the drawn number.
        column = (candidates.cumsum(axis=1) > drawn[:, None]).argmax(axis=1)
        is_negative = wants_negative_B[rows] & (num_candidates > 0)
        image_B[rows] = np.where(is_negative, start + column, image_B[rows])
        label_B[rows] = ~is_negative
    return ImageChoice(image_B, label_B)


def wants_negative(positions_B: I64, *, seed: int, group_size: int) -> npt.NDArray[np.bool_]:
    """Which pairs are to be shown with another image: half of each group."""
    return np.concatenate(
        [
            rng.shuffled(rng.key(_group_key(seed, start, group_size), "label"), group_size) >= group_size // 2
            for start in positions_B[::group_size].tolist()
        ]
    )


def _group_key(seed: int, position: int, group_size: int) -> int:
    return int(rng.bits(rng.key(seed, "itm"), position // group_size))
