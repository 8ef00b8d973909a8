"""What data hands to tasks.

Shapes: B pairs of the micro-batch, L text tokens (the longest caption of the micro-batch), M masked tokens of the
micro-batch, S image side in pixels, N images, T captions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PretrainBatch(NamedTuple):
    """One micro-batch of pairs, with every random choice already made."""

    pixels_N3SS: Tensor
    """uint8; normalised on the device. The pairs' own images, then those that are there as negatives alone."""
    clean_ids_BL: Tensor
    """int64 token ids, padded."""
    masked_ids_BL: Tensor
    """int64; the clean ids with some tokens masked, replaced or kept (MLM)."""
    attention_mask_BL: Tensor
    """bool; True for real tokens."""
    mlm_index_M: Tensor
    """int64; flat index (b * L + l) of each token to predict."""
    mlm_label_M: Tensor
    """int64; its clean id."""
    mlm_weight_M: Tensor
    """float32; the weight of its loss. Each group of pairs counts equally, each token equally within its group, so
    that the loss is the published mean over a micro-batch of that group's size however the batch is cut."""
    itm_image_B: Tensor
    """int64; row n of the image that pair b's caption is shown with: b itself, or its negative's."""
    itm_label_B: Tensor
    """int64; 1 where that image is the pair's own."""
    image_id_B: Tensor
    """int64; pairs with the same id show the same picture."""
    corpus_B: Tensor
    """int64; the corpus of each pair, a number in the order of data.train_shards."""
    num_tokens: tuple[int, ...]
    """Tokens of each caption, known to the host."""
    num_masked: tuple[int, ...]
    """Of these, those to predict."""
    replaced_B: Tensor
    """bool; True where another pair took the place of one that cannot be read (data.on_bad_sample)."""
    notes: tuple[str, ...] = ()
    """Why, for people."""
    lines: tuple[str, ...] = ()
    """What the pairs are, for data.record_pairs: a JSON text each."""


class ImageBatch(NamedTuple):
    """Some images of a held-out split."""

    first: int
    """Number of the first one in the split; they are consecutive."""
    pixels_N3SS: Tensor
    """uint8."""


class TextBatch(NamedTuple):
    """Some captions of a held-out split."""

    first: int
    """Number of the first one in the split; they are consecutive."""
    clean_ids_TL: Tensor
    masked_ids_TL: Tensor
    attention_mask_TL: Tensor
    mlm_index_M: Tensor
    mlm_label_M: Tensor
