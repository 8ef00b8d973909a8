"""The operations of a pretraining step (MLM and ITM) as formulas, part by part.

They are written down from the equations of the layers and from what each saving leaves of them, and share nothing with
the code that runs: where they and the counter of ``bridgetower/flops.py`` differ, one of the two is wrong. What
``compute.recompute`` computes anew is not work, and left out.

Shapes: B pairs, T tokens of their captions, L of the longest, N images, P image positions, D width, R rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from bridgetower.config.schema import ComputeConfig, ModelConfig
from bridgetower.rows import BUCKET_TOKENS

# A backward pass makes two products, of the gradients of either factor, for each of the forward pass.
_FORWARD_AND_BACKWARD = 3


class StepParts(NamedTuple):
    """Operations of a pair, forward and backward; a multiplication and an addition count as two."""

    vision_tower: float
    image_transform: float
    """To the fusion width, for the bridges."""
    text_tower: float
    """With its transform."""
    image_stream: float
    """The cross-modal layers' image side."""
    text_stream: float
    """The cross-modal layers' text side."""
    heads: float
    """Words at the tokens that are predicted, poolers, and match or no match."""

    def total(self) -> float:
        """Of all parts."""
        return sum(self)


def step_parts(
    config: ModelConfig, compute: ComputeConfig, text_tokens: Sequence[int], masked_tokens: Sequence[int]
) -> StepParts:
    """Work out a step in training mode.

    Args:
        config: complete (``complete_model_config``), of two or more cross-modal layers, all bridged by addition.
        text_tokens: length of each caption with its start and end.
        masked_tokens: of each caption, how many are predicted.
    """
    fusion = config.fusion
    assert fusion.bridge == "add" and fusion.num_bridged == fusion.num_layers >= 2, "other forms have other formulas"
    step = _Step(config, compute, text_tokens, masked_tokens)
    pairs = len(text_tokens)
    passes = [("mlm", "itm")] if compute.joint_pass else [("mlm",), ("itm",)]
    parts = (
        step.vision_tower(),
        step.image_transform(),
        step.text_tower(),
        sum(step.image_layer(kinds, layer) for kinds in passes for layer in range(fusion.num_layers)),
        sum(step.text_layer(kinds, layer) for kinds in passes for layer in range(fusion.num_layers)),
        step.heads(),
    )
    return StepParts(*(part / pairs for part in parts))


class _Step:
    """Lengths and counts that the formulas share; all results are of the whole micro-batch."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, text_tokens: Sequence[int], masked_tokens: Sequence[int]
    ) -> None:
        self.config, self.compute = config, compute
        self.pairs = len(text_tokens)
        captions = sorted(zip(text_tokens, masked_tokens, strict=True))
        longest = captions[-1][0]
        if not compute.pack_text:
            captions = [(longest, masked) for _, masked in captions]
        self.lengths, self.masked = ([caption[n] for caption in captions] for n in (0, 1))
        self.longest, self.tokens = longest, sum(self.lengths)
        # Rows of similar length stand together; each part is as wide as its longest row.
        self.buckets = [list(part) for _, part in groupby(captions, lambda caption: -(-caption[0] // BUCKET_TOKENS))]
        self.images = self.pairs * (1 if compute.share_images else 2)
        self.positions = (config.image_size_px // config.vision.patch_size_px) ** 2 + 1
        fusion = config.fusion
        self.absorbs = compute.absorb_projections and config.text.max_tokens * (fusion.num_heads - 1) < fusion.width

    def vision_tower(self) -> float:
        vision, positions = self.config.vision, self.positions
        # Pixels need no gradient.
        patches = 2 * _product(positions - 1, 3 * vision.patch_size_px**2, vision.width)
        block = 12 * _product(positions, vision.width, vision.width) + 2 * _product(positions, vision.width, positions)
        return self.images * (patches + _FORWARD_AND_BACKWARD * vision.num_layers * block)

    def image_transform(self) -> float:
        fusion = self.config.fusion
        one = _product(self.positions, self.config.vision.width, fusion.width)
        return _FORWARD_AND_BACKWARD * self.images * fusion.num_bridged * one

    def text_tower(self) -> float:
        """Masked captions and clean ones."""
        text, fusion = self.config.text, self.config.fusion
        attention = 2 * self.pairs * _product(self.longest, text.width, self.longest)
        layer = 12 * _product(self.tokens, text.width, text.width) + attention
        transforms = fusion.num_bridged * _product(self.tokens, text.width, fusion.width)
        return 2 * _FORWARD_AND_BACKWARD * (text.num_layers * layer + transforms)

    def image_layer(self, kinds: tuple[str, ...], layer: int) -> float:
        width, positions, rows = self.config.fusion.width, self.positions, self.pairs * len(kinds)
        image, pair = _product(positions, width, width), _product(positions, width, self.longest)
        self_attention = 2 * _product(positions, width, positions)
        texts = 2 * _product(self.tokens * len(kinds), width, width)  # to keys and values
        is_last = layer == self.config.fusion.num_layers - 1
        if is_last and self.compute.prune_last_layer:
            if "itm" not in kinds:
                return 0.0
            # The class token's queries alone, of ITM's rows.
            one = _product(1, width, width)
            attention = 2 * _product(1, width, positions) + 2 * _product(1, width, self.longest)
            own = self.pairs * (12 * one + 2 * image + attention)
            return _FORWARD_AND_BACKWARD * (own + 2 * _product(self.tokens, width, width))
        common = rows * (9 * image + 2 * pair) + texts  # cross-attention's output, and a feed-forward
        if layer == 0 and self.compute.share_first_layer:
            if self.config.fusion.dropout:  # each row draws its own
                own = 3 * self.images * image + rows * (image + self_attention + image)
            else:
                own = self.images * (4 * image + self_attention + image)
        else:
            own = rows * (4 * image + self_attention + image)
        # MLM reads words alone: nothing goes back through the last layer of its images.
        return (1 if is_last and kinds == ("mlm",) else _FORWARD_AND_BACKWARD) * (own + common)

    def text_layer(self, kinds: tuple[str, ...], layer: int) -> float:
        fusion, positions = self.config.fusion, self.positions
        width, rows, tokens = fusion.width, self.pairs * len(kinds), self.tokens * len(kinds)
        read, widest = tokens, self.longest
        grids = [(len(part), max(length for length, _ in part)) for part in self.buckets] * len(kinds)
        if layer == fusion.num_layers - 1 and self.compute.prune_last_layer:
            reads = [self._read(kind) for kind in kinds]
            read = sum(sum(counts) for counts in reads)
            widest = max(1, max(max(counts) for counts in reads))
            grids = [grid for kind in kinds for grid in self._read_grids(kind)]
        one = _product(1, width, width)
        own = 2 * (read + tokens) * one + 2 * rows * _product(widest, width, self.longest)
        if self.absorbs:
            looked = sum(rows * wide for rows, wide in grids)
            cross = 4 * read * one + 2 * _product(looked * fusion.num_heads, width, positions)
        else:
            seen = self.images if layer == 0 and self.compute.share_first_layer else rows
            cross = 2 * read * one + 2 * seen * positions * one + 2 * rows * _product(widest, width, positions)
        return _FORWARD_AND_BACKWARD * (own + cross + 8 * read * one)

    def _read(self, kind: str) -> list[int]:
        """Tokens that are read of each caption."""
        if kind == "itm":
            return [1] * self.pairs
        return self.masked if self.compute.masked_logits_only else self.lengths

    def _read_grids(self, kind: str) -> list[tuple[int, int]]:
        """Rows and width of each part."""
        if kind == "itm":
            return [(self.pairs, 1)]
        number = 1 if self.compute.masked_logits_only else 0
        return [(len(part), max(1, max(caption[number] for caption in part))) for part in self.buckets]

    def heads(self) -> float:
        width = self.config.fusion.width
        words = sum(self.masked) if self.compute.masked_logits_only else self.tokens
        word = _product(1, width, width) + _product(1, width, self.config.text.vocabulary_size)
        pair = 2 * _product(1, width, width) + _product(1, 2 * width, 2)
        return _FORWARD_AND_BACKWARD * (words * word + self.pairs * pair)


def _product(rows: int, inner: int, columns: int) -> int:
    """A matrix product."""
    return 2 * rows * inner * columns
