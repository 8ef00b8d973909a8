"""What data hands to tasks.

Shapes: B pairs of the micro-batch, L text tokens (the longest caption of the micro-batch), M masked tokens of the
micro-batch, S image side in pixels, N images, T captions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NO_TOKEN = -100
"""In place of a masked token's id, where there is none; torch's cross-entropy leaves it out."""


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


class FinetuneBatch(NamedTuple):
    """Some pairs of a picture (NLVR2: two) and a text, with what is to be learned of them.

    C classes. B may be larger than the number of images, where texts of the same picture stand together.
    """

    pixels_N3SS: Tensor
    """uint8; normalised on the device. NLVR2: all left pictures, then all right ones."""
    ids_BL: Tensor
    """int64 token ids, padded."""
    attention_mask_BL: Tensor
    """bool; True for real tokens."""
    image_B: Tensor
    """int64; row n of the (left) picture of each text."""
    target_BC: Tensor
    """float32; the score of each answer: 1 for the right class, or VQA's soft scores. C is 0 where pairs themselves
    are what is learned (retrieval)."""
    image_id_B: Tensor
    """int64; pairs with the same id show the same picture."""
    draw_B2: Tensor
    """float64 in [0, 1); the random numbers of a pair's hard negatives: of its image, of its text."""
    replaced_B: Tensor
    """bool; True where another pair took the place of one that cannot be read (data.on_bad_sample)."""
    notes: tuple[str, ...] = ()
    """Why, for people."""
