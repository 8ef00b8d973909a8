"""The shapes of a micro-batch on its way through the model, and the layer formulas of each part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.grids import Grid, RowLayout, dense, pack_rows, pad_rows, repeat_cuts
from bridgetower.cost.layers import LayerCosts
from bridgetower.cost.sizes import mlp_width_of_text
from bridgetower.cost.work import OperatorMemory
from bridgetower.model.absorption import absorbs_projections
from bridgetower.step.packing import group_similar
from bridgetower.step.plan import BUCKET_TOKENS


@dataclass(frozen=True, kw_only=True)
class StepShapes:
    """Shapes of one micro-batch, its pairs in the order of their captions' lengths."""

    config: ModelConfig
    objectives: ObjectivesConfig
    recompute: tuple[str, ...]
    """Parts whose layers are recomputed in the backward pass."""
    num_pairs: int
    num_images: int
    """Images of the pairs, and those that are there only as negatives."""
    num_contrasted: int
    """Pairs of all ranks' micro-batches, which ITC compares."""
    num_frozen: tuple[int, int]
    """Lowest layers of the vision and the text tower that are not trained; -1 is a whole tower."""
    positions: int
    """Positions of an image, the class token included."""
    text_mlp_width: int
    lengths: tuple[int, ...]
    """Tokens that are computed of each caption, ascending; all the longest where padding is computed."""
    masked: tuple[int, ...]
    """Masked tokens of each caption, in the same order."""
    cuts: tuple[int, ...]
    """Pair at which each bucket of captions of similar length ends."""
    is_packed: bool
    """True if nothing is computed for padding."""
    absorbs: bool
    """True if texts attend to images without projecting these to keys and values."""
    vision_costs: LayerCosts
    text_costs: LayerCosts
    fusion_costs: LayerCosts

    @property
    def row_objectives(self) -> tuple[str, ...]:
        """Objectives that give the cross-modal encoder rows: one row per pair and objective, all in one pass."""
        return tuple(name for name in ("mlm", "itm") if name in self.objectives.heads)

    @property
    def num_texts(self) -> int:
        """How many versions of each caption the text tower reads: masked for MLM, clean for ITM and ITC."""
        active = self.objectives.heads
        return ("mlm" in active) + ("itm" in active or "itc" in active)

    @property
    def rows(self) -> int:
        """Rows of the cross-modal encoder."""
        return self.num_pairs * len(self.row_objectives)

    @property
    def image_grid(self) -> Grid:
        """All images, as the vision tower reads them."""
        return dense(self.num_images, self.positions)

    def layout_texts(self, num_versions: int) -> RowLayout:
        """Lay out so many versions of all captions, one version after the other."""
        if not self.is_packed:
            return pad_rows(self.num_pairs * num_versions, self.lengths[0])
        return pack_rows(self.lengths * num_versions, repeat_cuts([self.cuts] * num_versions, self.num_pairs))

    def layout_read_tokens(self) -> RowLayout:
        """Lay out the tokens whose last state a loss reads: masked tokens for MLM, class tokens for ITM."""
        counts = {"mlm": self.masked, "itm": (1,) * self.num_pairs}
        cuts = {"mlm": self.cuts, "itm": (self.num_pairs,)}
        return pack_rows(
            [count for name in self.row_objectives for count in counts[name]],
            repeat_cuts([cuts[name] for name in self.row_objectives], self.num_pairs),
        )


def find_shapes(
    config: ModelConfig,
    objectives: ObjectivesConfig,
    compute: ComputeConfig,
    captions: CaptionLengths,
    *,
    element_bytes: int,
    memory: OperatorMemory,
    num_images: int,
    num_frozen: tuple[int, int],
    num_contrasted: int,
    positions: int,
) -> StepShapes:
    """Find the shapes of a micro-batch, as ``bridgetower.step.plan`` plans it.

    Args:
        config: complete.
        num_images: 0: one per pair.
        num_contrasted: 0: the pairs of this micro-batch.
    """
    num_pairs = len(captions.num_tokens)
    order = np.argsort(captions.num_tokens, kind="stable")
    lengths = tuple(captions.num_tokens[pair] for pair in order)
    cuts = tuple(group_similar(np.asarray(lengths, np.int64), BUCKET_TOKENS))
    is_packed = not config.fusion.sees_padding
    if not is_packed:
        lengths, cuts = (max(lengths),) * num_pairs, (num_pairs,)
    mask_bytes = 0 if memory.draws_again and compute.fuse_kernels else memory.mask_bytes
    return StepShapes(
        config=config,
        objectives=objectives,
        recompute=compute.recompute,
        num_pairs=num_pairs,
        num_images=num_images or num_pairs,
        num_contrasted=num_contrasted or num_pairs,
        num_frozen=num_frozen,
        positions=positions,
        text_mlp_width=mlp_width_of_text(config.text),
        lengths=lengths,
        masked=tuple(captions.num_masked[pair] for pair in order),
        cuts=cuts,
        is_packed=is_packed,
        absorbs=absorbs_projections(config),
        vision_costs=LayerCosts(element_bytes, memory, 0.0),
        text_costs=LayerCosts(element_bytes, memory, config.text.dropout, mask_bytes),
        fusion_costs=LayerCosts(element_bytes, memory, config.fusion.dropout, mask_bytes),
    )
