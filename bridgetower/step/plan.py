"""The rows of a pretraining step: which texts and images go through the model, where their tokens stand, what is read.

Planned on the host from the lengths of the captions, so that nothing waits for the device. Shapes: B pairs, L tokens of
the longest caption, T tokens of all texts, R rows of a pass, Q tokens that are read, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.batch import NO_TOKEN, PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.kernels.spans import tile
from bridgetower.model.cross_modal import Wanted
from bridgetower.model.packed import I64, Layout, Packing, padded, similar

# By which rooms differ at least.
_FEWEST_PLACES = 32
# Texts whose lengths differ by less than this are one bucket.
BUCKET_TOKENS = 8


class Pass(NamedTuple):
    """What goes through the cross-modal encoder together: the rows of MLM, those of ITM, or both."""

    tokens: slice
    """Of the texts' tokens."""
    layout: Layout
    image_R: Tensor
    wanted: Wanted
    kinds: tuple[str, ...]
    """itm, mlm: what each B of its rows are for. ITM reads B text tokens, its class tokens; MLM the others after it."""


class StepRows(NamedTuple):
    """A micro-batch as the model works on it, pairs in the order of their captions' lengths."""

    ids_T: Tensor
    """Tokens of the clean captions, then of the masked ones, as the objectives need them."""
    column_T: Tensor
    """Column of each in its caption."""
    layout: Layout
    """Of all texts, for the text tower."""
    passes: list[Pass]
    order_B: Tensor
    """Pair that stands at each place."""
    itm_label_B: Tensor
    image_id_B: Tensor
    """As the batch has them, in this order."""
    corpus_B: Tensor
    """In the batch's."""
    class_B: Tensor
    """Where the class tokens of the first texts stand: the clean ones, if there are any."""
    mlm_read_M: Tensor | None
    """Which of the tokens that are read for MLM each loss is of; None: each its own."""
    mlm_label_M: Tensor
    """NO_TOKEN in places of a room that are empty, here and below."""
    mlm_weight_M: Tensor
    mlm_pair_M: Tensor
    """The pair that each is of; B in places that are empty."""


class Room(NamedTuple):
    """Places of a step that is recorded: batches that fit into the same have the same shapes."""

    tokens: int
    """Of one kind of text."""
    longest: int
    """Tokens of a caption."""
    masked: int
    most_masked: int
    """Of a caption."""


def can_be_recorded(objectives: ObjectivesConfig, compute: ComputeConfig) -> bool:
    """Whether batches of a run may share the shapes of a room, and nothing of its step waits for the host or a rank."""
    return (
        compute.cuda_graphs
        and objectives.mlm
        and objectives.itm
        and not objectives.itc  # gathers from all ranks
        and compute.share_images
        and compute.pack_text
        and compute.masked_logits_only
        and compute.joint_pass
        and compute.fuse_kernels
        and not compute.recompute  # draws again from torch's generator
        and not compute.compile
    )


def room_for(batch: PretrainBatch) -> Room:
    """A room for a micro-batch, which it shares with many others of as many pairs.

    In batches of 32 and more less than one place a caption is left empty among its dozen tokens, and one among those
    that are masked. In smaller ones it is more, as there would be as many rooms as batches else.
    """
    step = max(_FEWEST_PLACES, _up(len(batch.num_tokens), 8))
    return Room(
        tokens=_up(sum(batch.num_tokens), step),
        longest=tile(max(batch.num_tokens)),
        masked=_up(max(1, sum(batch.num_masked)), step),
        most_masked=tile(max(batch.num_masked)),
    )


def plan_rows(
    batch: PretrainBatch, objectives: ObjectivesConfig, compute: ComputeConfig, room: Room | None = None
) -> StepRows:
    """Plan a micro-batch.

    Args:
        room: gives tensors that other batches share their shapes with, for captions that are packed, masked tokens that
            alone are read, one pass for both objectives, and attention that needs no grid. The empty places are the
            last ones.
    """
    num_pairs, longest = batch.clean_ids_BL.shape
    count_B = np.asarray(batch.num_masked, np.int64)
    if compute.pack_text:
        length_B = np.asarray(batch.num_tokens, np.int64)
        order_B = np.argsort(length_B, kind="stable")
        length_B = length_B[order_B]
        cuts = similar(length_B, BUCKET_TOKENS)
    else:
        order_B, length_B, cuts = np.arange(num_pairs), np.full(num_pairs, longest), [num_pairs]
    num_tokens = int(length_B.sum())  # T, of one kind of text
    column_T = _ranges(length_B)
    source_T = np.repeat(order_B, length_B) * longest + column_T
    place_S = np.zeros(num_pairs * longest, np.int64)  # where each token of the padded captions stands
    place_S[source_T] = np.arange(num_tokens)
    # Masked tokens in the order of their pairs' places.
    masked_M = np.repeat((np.cumsum(count_B) - count_B)[order_B], count_B[order_B]) + _ranges(count_B[order_B])

    text_kinds = ["clean"] * (objectives.itm or objectives.itc) + ["mlm"] * objectives.mlm
    kinds = [kind for kind in ("itm", "mlm") if getattr(objectives, kind)]
    passes = [kinds] if compute.joint_pass else [[kind] for kind in kinds]
    read_B = {"mlm": count_B[order_B] if compute.masked_logits_only else length_B, "itm": np.ones(num_pairs, np.int64)}
    read_cuts = {"mlm": cuts, "itm": [num_pairs]}

    packing = Packing()
    numbers = [packing.table(values) for values in (order_B, source_T, column_T, place_S, masked_M)]
    first = packing.table(np.cumsum(length_B) - length_B)

    def layout_texts(num_kinds: int) -> int:
        length_R = np.tile(length_B, num_kinds)
        if room is not None:  # the tokens of one kind are read from among those of all
            return packing.rows_in(length_R, room.tokens * len(text_kinds), room.longest)
        return packing.layout(length_R, _repeated([cuts] * num_kinds, num_pairs))

    def layout_read(part: list[str]) -> int:
        length_R = np.concatenate([read_B[kind] for kind in part])
        if room is not None:
            return packing.rows_in(
                length_R, room.masked * ("mlm" in part) + num_pairs * ("itm" in part), room.most_masked
            )
        return packing.layout(length_R, _repeated([read_cuts[kind] for kind in part], num_pairs))

    texts = {n: layout_texts(n) for n in (1, 2)}
    wanted = [layout_read(part) for part in passes]
    tables, layouts = packing.on(batch.clean_ids_BL.device)
    order, source, column, place, masked = (tables[number] for number in numbers)

    def layout_of(num_kinds: int) -> Layout:
        if compute.pack_text:
            return layouts[texts[num_kinds]]
        return padded(batch.attention_mask_BL.repeat(num_kinds, 1))

    index_M = batch.mlm_index_M[masked]
    masked_place_M = place[index_M]
    all_T = torch.arange(num_tokens, device=place.device)
    read_tokens = {"mlm": masked_place_M if compute.masked_logits_only else all_T, "itm": tables[first]}
    # Not shared, ITM's images stand after all others, once more.
    itm_images = batch.itm_image_B[order] if compute.share_images else order + len(batch.pixels_N3SS)
    images = {"mlm": order, "itm": itm_images}
    text_places = num_tokens * len(text_kinds) if room is None else room.tokens * len(text_kinds)
    masked_places = len(index_M) if room is None else room.masked
    found = []
    for part, layout in zip(passes, wanted, strict=True):
        # The clean texts come first, and are alone where there is a pass for ITM.
        start, end = num_tokens * (len(text_kinds) - 1) if part == ["mlm"] else 0, num_tokens * len(text_kinds)
        if part == ["itm"]:
            end = num_tokens
        read = torch.cat([read_tokens[kind] + num_tokens * n for n, kind in enumerate(part)])
        has_itm = "itm" in part
        found.append(
            Pass(
                tokens=slice(start, end if room is None else text_places),
                layout=layout_of(len(part)),
                image_R=torch.cat([images[kind] for kind in part]),
                wanted=Wanted(
                    token_Q=_fill(read, len(read) + masked_places - len(index_M)),
                    token_layout=layouts[layout],
                    image_rows=slice(0, num_pairs * has_itm),
                    tokens=slice(0, has_itm * (num_tokens if room is None else text_places)),
                    layout=layout_of(1),
                ),
                kinds=tuple(part),
            )
        )
    sources = {"mlm": batch.masked_ids_BL, "clean": batch.clean_ids_BL}
    return StepRows(
        ids_T=_fill(torch.cat([sources[kind].flatten()[source] for kind in text_kinds]), text_places),
        column_T=_fill(column.repeat(len(text_kinds)), text_places),
        layout=layout_of(len(text_kinds)),
        passes=found,
        order_B=order,
        itm_label_B=batch.itm_label_B[order],
        image_id_B=batch.image_id_B[order],
        corpus_B=batch.corpus_B,
        class_B=tables[first],
        mlm_read_M=None if compute.masked_logits_only else masked_place_M,
        mlm_label_M=_fill(batch.mlm_label_M[masked], masked_places, NO_TOKEN),
        mlm_weight_M=_fill(batch.mlm_weight_M[masked], masked_places),
        mlm_pair_M=_fill(index_M // longest, masked_places, num_pairs),
    )


def read_columns(mask_RL: Tensor, column_Q: I64, count_R: I64, *, images: bool) -> Wanted:
    """What is read of padded texts.

    Args:
        column_Q: which columns of each row, row by row.
        count_R: how many of each row.
        images: whether each row's image state is read too.
    """
    num_rows, width = mask_RL.shape
    packing = Packing()
    tokens = packing.table(np.repeat(np.arange(num_rows), count_R) * width + column_Q)
    layout = packing.layout(count_R, [num_rows])
    tables, layouts = packing.on(mask_RL.device)
    rows = num_rows if images else 0
    return Wanted(
        token_Q=tables[tokens],
        token_layout=layouts[layout],
        image_rows=slice(0, rows),
        tokens=slice(0, rows * width),
        layout=padded(mask_RL),
    )


def _fill(values: Tensor, num_places: int, value: int = 0) -> Tensor:
    """With so many places, the empty ones last."""
    return F.pad(values, (0, num_places - len(values)), value=value) if num_places > len(values) else values


def _up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step


def _repeated(cuts: Sequence[Sequence[int]], num_pairs: int) -> list[int]:
    """Where parts end if one kind of row after the other is cut."""
    return [num_pairs * number + cut for number, part in enumerate(cuts) for cut in part]


def _ranges(length_R: I64) -> I64:
    """0 to n - 1 for each n, one after the other."""
    return np.arange(int(length_R.sum())) - np.repeat(np.cumsum(length_R) - length_R, length_R)
