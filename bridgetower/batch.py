"""Batches: what the data loader hands to a task.

Shapes: B pairs of the micro-batch, L text tokens (the longest caption of the micro-batch), M masked tokens of the
micro-batch, S image side in pixels, N images, T captions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NO_TOKEN = -100
"""Label of a padded slot, which has no masked token: the index that torch's cross-entropy ignores."""


class PretrainBatch(NamedTuple):
    """One micro-batch of pairs, with every random choice already made."""

    pixels_N3SS: Tensor
    """uint8; normalised on the device. The pairs' own images first, then images that serve only as negatives."""
    clean_ids_BL: Tensor
    """int64 token ids, padded."""
    masked_ids_BL: Tensor
    """int64; the clean ids with some tokens masked, replaced or kept (MLM)."""
    attention_mask_BL: Tensor
    """bool; True for real tokens."""
    mlm_index_M: Tensor
    """int64; flat index (b * L + l) of each token to predict."""
    mlm_label_M: Tensor
    """int64; clean id of each token to predict."""
    mlm_weight_M: Tensor
    """float32; weight of each predicted token's loss. Groups of pairs have equal weight, and so have the tokens of a
    group. The loss is thus the published mean over a micro-batch of one group, however large the micro-batch is."""
    itm_image_B: Tensor
    """int64; row n of the image that ITM pairs with caption b: b itself, or a negative."""
    itm_label_B: Tensor
    """int64; 1 where ``itm_image_B`` is the pair's own image, else 0."""
    image_id_B: Tensor
    """int64; pairs with the same id show the same image."""
    corpus_B: Tensor
    """int64; corpus of each pair, as an index into data.train_shards."""
    num_tokens: tuple[int, ...]
    """Number of tokens of each caption, on the host."""
    num_masked: tuple[int, ...]
    """Number of masked tokens of each caption, on the host."""
    replaced_B: Tensor
    """bool; True where another pair replaces one that cannot be read (data.on_bad_sample)."""
    notes: tuple[str, ...] = ()
    """Messages for people that say why pairs were replaced."""
    lines: tuple[str, ...] = ()
    """One JSON line per pair that identifies it, for data.record_pairs."""


class ImageBatch(NamedTuple):
    """Consecutive images of a held-out split."""

    first: int
    """Index of the first one in the split."""
    pixels_N3SS: Tensor
    """uint8."""


class TextBatch(NamedTuple):
    """Consecutive captions of a held-out split, with the fields of a PretrainBatch."""

    first: int
    """Index of the first one in the split."""
    clean_ids_TL: Tensor
    masked_ids_TL: Tensor
    attention_mask_TL: Tensor
    mlm_index_M: Tensor
    mlm_label_M: Tensor


class FinetuneBatch(NamedTuple):
    """One micro-batch of pairs of an image (NLVR2: two images) and a text, with their targets.

    C classes. B may be larger than the number of images, since texts of the same image are batched together.
    """

    pixels_N3SS: Tensor
    """uint8; normalised on the device. NLVR2: all left images, then all right ones."""
    ids_BL: Tensor
    """int64 token ids, padded."""
    attention_mask_BL: Tensor
    """bool; True for real tokens."""
    image_B: Tensor
    """int64; row n of the (left) image of each text."""
    target_BC: Tensor
    """float32; score of each answer: 1 for the right class, or VQA's soft scores. C is 0 in retrieval, whose targets
    are the pairs themselves."""
    image_id_B: Tensor
    """int64; pairs with the same id show the same image."""
    draw_B2: Tensor
    """float64 in [0, 1); random numbers that draw each pair's hard negatives: a wrong image, a wrong text."""
    replaced_B: Tensor
    """bool; True where another pair replaces one that cannot be read (data.on_bad_sample)."""
    notes: tuple[str, ...] = ()
    """Messages for people that say why pairs were replaced."""
