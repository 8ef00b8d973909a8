"""The plan of a pretraining step: which texts and images go through the model, where their tokens lie, what is read.

It is made on the host from the lengths of the captions, so that nothing waits for the device. Three pairs whose
captions have 3, 4 and 4 tokens, sorted by length, with MLM and ITM (``.`` a token, ``#`` a masked one):

    text tower       clean      . . . | . . . . | . . . .        T tokens, no padding between them
                     masked     . # . | . . # . | # . . .
    vision tower     image 0, 1, 2                               each once
                         |
    cross-modal      rows 0-2   clean caption b  + image shown for ITM (b's own, or a negative's)
    encoder          rows 3-5   masked caption b + b's own image
                         |
    last layer       Q tokens   <s> of rows 0-2, then # of rows 3-5: nothing else of it is computed
                     images     class token of rows 0-2
                         |
    heads            ITM reads the pooled rows 0-2, MLM the masked tokens, ITC the towers' class tokens

Shapes: B pairs, L tokens of the longest caption, T tokens of all texts, R rows of the cross-modal encoder, Q tokens
that are read, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.batch import NO_TOKEN, PretrainBatch
from bridgetower.config.run import ObjectivesConfig
from bridgetower.kernels.layout import Layout, padded, tile_size
from bridgetower.model.cross_modal import ReadStates
from bridgetower.step.packing import I64, Packing, count_up, group_similar, repeat_ends

BUCKET_TOKENS = 8
"""Captions whose lengths differ by less than this are padded to one length where attention needs a grid."""
_SMALLEST_STEP = 32  # by which the sizes of shape buckets differ at least


class FusionPass(NamedTuple):
    """What goes through the cross-modal encoder: the rows of ITM, those of MLM, or both, ITM's first."""

    tokens: slice
    """Tokens of these rows among those of all texts."""
    layout: Layout
    image_R: Tensor
    """The image that each row sees."""
    read: ReadStates
    kinds: tuple[str, ...]
    """itm, mlm: the objective of each B rows. ITM reads the class tokens of B texts, MLM the tokens after them."""


class StepPlan(NamedTuple):
    """A micro-batch as the model works on it, pairs in the order of their captions' lengths."""

    ids_T: Tensor
    """Tokens of the clean captions, then of the masked ones, as the objectives need them."""
    column_T: Tensor
    """Position of each token in its caption, from 0."""
    layout: Layout
    """Layout of all texts, for the text tower."""
    fusion: FusionPass
    order_B: Tensor
    """The pair at each position of this plan."""
    itm_label_B: Tensor
    """ITM's labels, permuted by ``order_B``."""
    image_id_B: Tensor
    """Image ids, permuted by ``order_B``."""
    corpus_B: Tensor
    """Corpus of each pair, in the batch's own order."""
    class_B: Tensor
    """Offsets of the class tokens of the first texts: of the clean captions, if there are any."""
    mlm_label_M: Tensor
    """Clean id of each masked token; NO_TOKEN in padded slots of a shape bucket."""
    mlm_weight_M: Tensor
    """Weight of each masked token's loss; 0 in padded slots."""
    mlm_pair_M: Tensor
    """The pair of each masked token, in the batch's own order; B in padded slots."""


class ShapeBucket(NamedTuple):
    """Padded sizes of one CUDA graph. Batches in the same bucket share it."""

    tokens: int
    """Tokens of one kind of text, clean or masked."""
    longest: int
    """Tokens of the longest caption."""
    masked: int
    """Masked tokens of all captions."""
    most_masked: int
    """Masked tokens of one caption."""


def fit_bucket(batch: PretrainBatch) -> ShapeBucket:
    """Return the shape bucket of a micro-batch, which many others of as many pairs share.

    With 32 pairs or more, padding costs less than one of about twelve tokens per caption, and less than one masked
    token. Smaller batches pad more: finer buckets would mean a CUDA graph for every batch.
    """
    step = max(_SMALLEST_STEP, _round_up(len(batch.num_tokens), 8))
    return ShapeBucket(
        tokens=_round_up(sum(batch.num_tokens), step),
        longest=tile_size(max(batch.num_tokens)),
        masked=_round_up(max(1, sum(batch.num_masked)), step),
        most_masked=tile_size(max(batch.num_masked)),
    )


def plan_step(
    batch: PretrainBatch, objectives: ObjectivesConfig, *, packs: bool = True, bucket: ShapeBucket | None = None
) -> StepPlan:
    """Plan a micro-batch.

    Args:
        packs: leave padding out; False where a bridge attends to padding (``FusionConfig.sees_padding``).
        bucket: pad to these sizes, so that batches share their tensors' shapes. Only for packed captions and attention
            that needs no grid. Padded slots stand last.
    """
    captions = _Captions.of(batch, packs=packs)
    # ITM and ITC read clean captions, MLM masked ones: the text tower runs over both kinds in one packed sequence.
    text_kinds = ["clean"] * (objectives.itm or objectives.itc) + ["masked"] * objectives.mlm
    fusion_kinds = [kind for kind in ("itm", "mlm") if getattr(objectives, kind)]
    num_text_slots = (bucket.tokens if bucket else captions.num_tokens) * len(text_kinds)
    num_masked_slots = bucket.masked if bucket else captions.num_masked
    # Every index is computed on the host, where the lengths are known, and all of them go to the device in one copy:
    # an index that the device computed would make the host wait for it.
    packing = Packing()
    tables = [packing.add_table(values) for values in captions.tables(batch.clean_ids_BL.shape[1])]
    texts = {n: captions.add_texts(packing, n, num_text_slots, bucket) for n in (1, 2)}
    read = captions.add_read(packing, fusion_kinds, bucket)
    on_device, layouts = packing.to_device(batch.clean_ids_BL.device)
    indices = _Indices(*(on_device[number] for number in tables))
    order_B, masked_M = indices.order_B, indices.masked_M

    def layout_of(num_texts: int) -> Layout:
        return layouts[texts[num_texts]] if packs else padded(batch.attention_mask_BL.repeat(num_texts, 1))

    fusion = _plan_fusion(batch, fusion_kinds, len(text_kinds), captions.num_tokens, indices, layouts[read], layout_of)
    if bucket is not None:
        fusion = _pad_fusion(fusion, num_text_slots, num_masked_slots - captions.num_masked)
    ids = {"clean": batch.clean_ids_BL, "masked": batch.masked_ids_BL}
    return StepPlan(
        ids_T=_pad_to(torch.cat([ids[kind].flatten()[indices.source_T] for kind in text_kinds]), num_text_slots),
        column_T=_pad_to(indices.column_T.repeat(len(text_kinds)), num_text_slots),
        layout=layout_of(len(text_kinds)),
        fusion=fusion,
        order_B=order_B,
        itm_label_B=batch.itm_label_B[order_B],
        image_id_B=batch.image_id_B[order_B],
        corpus_B=batch.corpus_B,
        class_B=indices.class_B,
        mlm_label_M=_pad_to(batch.mlm_label_M[masked_M], num_masked_slots, NO_TOKEN),
        mlm_weight_M=_pad_to(batch.mlm_weight_M[masked_M], num_masked_slots),
        mlm_pair_M=_pad_to(batch.mlm_index_M[masked_M] // ids["clean"].shape[1], num_masked_slots, len(order_B)),
    )


class _Indices(NamedTuple):
    """What the plan of the captions becomes on the device, all int64."""

    order_B: Tensor
    source_T: Tensor
    """Flat index of each packed token in the padded captions."""
    column_T: Tensor
    slot_S: Tensor
    """Offset of each padded token among the packed ones."""
    masked_M: Tensor
    """Masked tokens in the order of their pairs."""
    class_B: Tensor


def _plan_fusion(
    batch: PretrainBatch,
    kinds: list[str],
    num_text_kinds: int,
    num_tokens: int,
    indices: _Indices,
    read_layout: Layout,
    layout_of: Callable[[int], Layout],
) -> FusionPass:
    """Plan the pass through the cross-modal encoder.

    Args:
        kinds: objectives that read it.
        num_text_kinds: kinds of text that the text tower encodes; the clean ones come first.
        num_tokens: tokens of one kind.
        layout_of: returns the layout of all captions, once or twice.
    """
    has_itm, num_pairs = "itm" in kinds, len(indices.order_B)
    # ITM's rows come first, so that their pooled pairs are the first B states that are read. MLM's masked tokens stand
    # behind all clean ones: at the offsets that they have there, moved by the number of clean tokens.
    masked_M = indices.slot_S[batch.mlm_index_M[indices.masked_M]] + num_tokens * (len(kinds) - 1)
    read_tokens = {"itm": indices.class_B, "mlm": masked_M}
    images = {"itm": batch.itm_image_B[indices.order_B], "mlm": indices.order_B}
    first_token = 0 if has_itm else num_tokens * (num_text_kinds - 1)
    return FusionPass(
        tokens=slice(first_token, first_token + num_tokens * len(kinds)),
        layout=layout_of(len(kinds)),
        image_R=torch.cat([images[kind] for kind in kinds]),
        read=ReadStates(
            token_Q=torch.cat([read_tokens[kind] for kind in kinds]),
            token_layout=read_layout,
            image_rows=slice(0, num_pairs * has_itm),
            tokens=slice(0, num_tokens * has_itm),
            layout=layout_of(1),
        ),
        kinds=tuple(kinds),
    )


def _pad_fusion(fusion: FusionPass, num_text_slots: int, num_masked_padding: int) -> FusionPass:
    """Return the pass for a shape bucket: the rows read their tokens among all slots, padding included."""
    read = fusion.read
    token_Q = _pad_to(read.token_Q, len(read.token_Q) + num_masked_padding)
    read = read._replace(token_Q=token_Q, tokens=slice(0, num_text_slots if read.tokens.stop else 0))
    return fusion._replace(tokens=slice(fusion.tokens.start, num_text_slots), read=read)


class _Captions(NamedTuple):
    """The captions of a micro-batch on the host, in the order of their lengths."""

    pair_B: I64
    """The pair at each position."""
    length_B: I64
    count_B: I64
    """Masked tokens of each pair, in the batch's own order."""
    bucket_ends: list[int]

    @classmethod
    def of(cls, batch: PretrainBatch, *, packs: bool) -> _Captions:
        num_pairs, longest = batch.clean_ids_BL.shape
        count_B = np.asarray(batch.num_masked, np.int64)
        if not packs:
            return cls(np.arange(num_pairs), np.full(num_pairs, longest), count_B, [num_pairs])
        # Sorted, so that captions of similar length are neighbours, and a bucket is a slice. The sort is stable,
        # so that the plan depends on the batch alone.
        length_B = np.asarray(batch.num_tokens, np.int64)
        pair_B = np.argsort(length_B, kind="stable")
        length_B = length_B[pair_B]
        return cls(pair_B, length_B, count_B, group_similar(length_B, BUCKET_TOKENS))

    @property
    def num_tokens(self) -> int:
        """T of one kind of text."""
        return int(self.length_B.sum())

    @property
    def num_masked(self) -> int:
        return int(self.count_B.sum())

    def tables(self, longest: int) -> list[I64]:
        """Return what the device needs: order, source of each token, its column, slot of each source, masked, starts.

        Args:
            longest: L of the padded captions.
        """
        column_T = count_up(self.length_B)
        source_T = np.repeat(self.pair_B, self.length_B) * longest + column_T
        slot_S = np.zeros(len(self.pair_B) * longest, np.int64)
        slot_S[source_T] = np.arange(self.num_tokens)
        # Masked tokens in the order of their pairs' positions.
        count_B, first_B = self.count_B[self.pair_B], (np.cumsum(self.count_B) - self.count_B)[self.pair_B]
        masked_M = np.repeat(first_B, count_B) + count_up(count_B)
        return [self.pair_B, source_T, column_T, slot_S, masked_M, np.cumsum(self.length_B) - self.length_B]

    def add_texts(self, packing: Packing, num_texts: int, num_slots: int, bucket: ShapeBucket | None) -> int:
        """Plan all captions, ``num_texts`` times. Returns: the number of the layout."""
        length_R = np.tile(self.length_B, num_texts)
        if bucket is not None:  # tokens of one kind are read among those of all kinds
            return packing.add_spans(length_R, num_slots, bucket.longest)
        return packing.add_layout(length_R, repeat_ends([self.bucket_ends] * num_texts, len(self.pair_B)))

    def add_read(self, packing: Packing, kinds: list[str], bucket: ShapeBucket | None) -> int:
        """Plan the tokens that are read of the last layer. Returns: the number of the layout."""
        num_pairs = len(self.pair_B)
        lengths = {"mlm": self.count_B[self.pair_B], "itm": np.ones(num_pairs, np.int64)}
        ends = {"mlm": self.bucket_ends, "itm": [num_pairs]}
        length_R = np.concatenate([lengths[kind] for kind in kinds])
        if bucket is not None:
            num_slots = bucket.masked * ("mlm" in kinds) + num_pairs * ("itm" in kinds)
            return packing.add_spans(length_R, num_slots, bucket.most_masked)
        return packing.add_layout(length_R, repeat_ends([ends[kind] for kind in kinds], num_pairs))


def read_columns(mask_RL: Tensor, column_Q: I64, count_R: I64, *, images: bool) -> ReadStates:
    """Return what is read of padded texts.

    Args:
        column_Q: columns that are read, row by row.
        count_R: how many of each row.
        images: read each row's image state, too.
    """
    num_rows, width = mask_RL.shape
    packing = Packing()
    tokens = packing.add_table(np.repeat(np.arange(num_rows), count_R) * width + column_Q)
    layout = packing.add_layout(count_R, [num_rows])
    tables, layouts = packing.to_device(mask_RL.device)
    num_image_rows = num_rows if images else 0
    return ReadStates(
        token_Q=tables[tokens],
        token_layout=layouts[layout],
        image_rows=slice(0, num_image_rows),
        tokens=slice(0, num_image_rows * width),
        layout=padded(mask_RL),
    )


def _pad_to(values: Tensor, num_slots: int, value: int = 0) -> Tensor:
    """Return the values with padded slots behind them."""
    return F.pad(values, (0, num_slots - len(values)), value=value) if num_slots > len(values) else values


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
