"""Random choices of a micro-batch: which tokens are masked, and which image each caption is paired with for ITM.

They depend only on the seed and the pairs' positions in the stream. Shapes: B pairs, L tokens, M masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower import rng
from bridgetower.data.text import Tokenizer

I64 = npt.NDArray[np.int64]

# As in BERT and RoBERTa, 80 % of the chosen tokens become <mask>, 10 % a random id, and 10 % stay.
_MASK_FRACTION = 0.8
_RANDOM_FRACTION = 0.1


class MaskedTokens(NamedTuple):
    """Token ids after masking, and the tokens that MLM predicts."""

    ids_BL: I64
    """Masked ids."""
    index_M: I64
    """Flat index b * L + l of each token to predict."""
    label_M: I64
    """Clean id of each token to predict."""


def mask_tokens(ids_BL: I64, counters_B: I64, tokenizer: Tokenizer, *, stream: int, probability: float) -> MaskedTokens:
    """Choose each ordinary token with ``probability``, and mask most of the chosen ones.

    Tokens are chosen singly, not by whole words, as the published code does for RoBERTa. A caption may get no masked
    token.

    Args:
        ids_BL: clean ids, padded.
        counters_B: positions of the pairs in the stream. A caption's masks depend on its counter alone.
        stream: key of the random numbers.
        probability: 0.15 in the paper.

    Source: BERT, arXiv 1810.04805, appendix A.1.
    """
    # Three random numbers per token: is it chosen, what happens to it, and which random id replaces it.
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
        fate_M < _MASK_FRACTION,
        tokenizer.mask_id,
        np.where(fate_M < _MASK_FRACTION + _RANDOM_FRACTION, random_M, label_M),
    )
    return MaskedTokens(masked_ids_BL, index_M, label_M)


def mlm_weights(index_M: I64, num_tokens: int, num_pairs: int, group_size: int) -> npt.NDArray[np.float32]:
    """Return the weight of each masked token's loss, float32, shape (M,).

    Groups of pairs weigh equally, and tokens weigh equally within a group. So the loss is the published mean over a
    micro-batch of one group's size, however pairs are divided into micro-batches.

    Args:
        num_tokens: L.
        num_pairs: B, a multiple of ``group_size``.
    """
    group_M = index_M // num_tokens // group_size
    num_groups = num_pairs // group_size
    tokens_per_group = np.bincount(group_M, minlength=num_groups)
    return (1.0 / (tokens_per_group[group_M] * num_groups)).astype(np.float32)


class ImageChoice(NamedTuple):
    """The image that each caption is paired with for ITM."""

    image_B: I64
    """Row among the micro-batch's images."""
    label_B: I64
    """1 if the image is the caption's own, else 0."""


def choose_images(
    image_id_B: npt.NDArray[np.uint64], corpus_B: I64, positions_B: I64, *, seed: int, group_size: int
) -> ImageChoice:
    """Pair half of each group's captions with their own image, and half with another image of the group.

    A negative never has the pair's image id, and comes from the same corpus if the group has such an image: the
    published code draws within the corpus, as images of another one could be recognised by their style. A pair for
    which the group has no other image stays a positive.

    Args:
        positions_B: consecutive positions in the stream, of which the first is a multiple of ``group_size``.
    """
    image_B = np.arange(len(positions_B))
    label_B = np.ones(len(positions_B), np.int64)
    wants_negative_B = wants_negative(positions_B, seed=seed, group_size=group_size)
    for start in range(0, len(positions_B), group_size):
        rows = slice(start, start + group_size)
        group_key = _group_key(seed, int(positions_B[start]), group_size)
        is_other_image = image_id_B[rows, None] != image_id_B[None, rows]
        is_preferred = is_other_image & (corpus_B[rows, None] == corpus_B[None, rows])
        is_candidate = np.where(is_preferred.any(axis=1, keepdims=True), is_preferred, is_other_image)
        num_candidates = is_candidate.sum(axis=1)
        drawn = rng.below(rng.key(group_key, "image"), np.arange(group_size), num_candidates)
        # Candidate number n stands in the column where the running count of candidates first exceeds n.
        column = (is_candidate.cumsum(axis=1) > drawn[:, None]).argmax(axis=1)
        is_negative = wants_negative_B[rows] & (num_candidates > 0)
        image_B[rows] = np.where(is_negative, start + column, image_B[rows])
        label_B[rows] = ~is_negative
    return ImageChoice(image_B, label_B)


def wants_negative(positions_B: I64, *, seed: int, group_size: int) -> npt.NDArray[np.bool_]:
    """Return True for the pairs that get another image: half of each group, bool, shape (B,)."""
    return np.concatenate(
        [
            rng.shuffled(rng.key(_group_key(seed, start, group_size), "label"), group_size) >= group_size // 2
            for start in positions_B[::group_size].tolist()
        ]
    )


def _group_key(seed: int, position: int, group_size: int) -> int:
    return int(rng.bits(rng.key(seed, "itm"), position // group_size))
