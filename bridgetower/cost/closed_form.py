"""What a micro-batch costs a GPU, from shapes alone: bytes kept between forward and backward, and operations.

No model is built and nothing is run: each layer's formula is written out below, and docs/plan.md explains them. Shapes:
B pairs, T tokens of all texts, L of the longest, N images, P image positions, R rows of the cross-modal encoder, Q
tokens that are read, M masked tokens, D width of a tower, W of the cross-modal encoder, K bridged layers, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.errors import ConfigError
from bridgetower.model.named_vits import is_clip_tower
from bridgetower.model.sizes import absorbs_projections
from bridgetower.model.text_tower import encoder_config
from bridgetower.step.packing import similar
from bridgetower.step.plan import BUCKET_TOKENS

PARTS = ("vision", "text", "fusion")
"""What compute.recompute may name."""
# Deviation of the logarithm of a caption's length.
_SPREAD = 0.4
# What the published step pads captions to.
PUBLISHED_TOKENS = 50


class Kernels(NamedTuple):
    """What the operators of a kind of device keep beside their results."""

    statistic_bytes: int | None
    """Of a norm's mean or deviation; None: as the states."""
    mask_bytes: int
    """Of an element of a dropout mask."""
    text_mask_bytes: int | None
    """The same in the text tower, whose layers are transformers'; None: as the states."""
    drops_inside: bool
    """Attention draws its dropout in the kernel; else it keeps all shares, and a byte for each."""
    draws_again: bool
    """With compute.fuse_kernels no mask of states is kept: the backward pass draws it again."""
    generator_bytes: int
    """State of the random numbers, which a layer that is computed again begins with."""


CUDA = Kernels(
    statistic_bytes=4, mask_bytes=1, text_mask_bytes=1, drops_inside=True, draws_again=True, generator_bytes=16
)
CPU = Kernels(
    statistic_bytes=None,
    mask_bytes=1,
    text_mask_bytes=None,
    drops_inside=False,
    draws_again=False,
    generator_bytes=5056,
)


class Work(NamedTuple):
    """Of some layers."""

    kept: int = 0
    """Bytes between forward and backward."""
    forward: int = 0
    """Operations."""
    backward: int = 0

    def __add__(self, other: object) -> Work:  # NamedTuple's own would join the tuples
        assert isinstance(other, Work)
        return Work(self.kept + other.kept, self.forward + other.forward, self.backward + other.backward)


class PartCost(NamedTuple):
    """Of a part of the model."""

    kept: int
    """Bytes between forward and backward."""
    largest_layer: int
    """Bytes that its largest layer keeps while it is computed again; 0 where nothing is."""
    forward: int
    """Operations."""
    backward: int
    repeated: int
    """Operations of computing again."""
    pieces: dict[str, int]
    """Operations, forward and backward, of what it is made of."""


class StepCost(NamedTuple):
    """Of forward and backward of a micro-batch."""

    parts: dict[str, PartCost]
    """By part of the model: vision, text, fusion, heads."""
    bridged: int
    """Bytes of the gradients of the towers' bridged states, which wait for the towers' backward pass."""
    passing: int
    """Bytes of gradients of states that are on their way."""
    first_gradient: int
    """Bytes of the gradient of MLM's decoder, which is there before anything is let go."""

    @property
    def kept(self) -> int:
        """Bytes between forward and backward."""
        return sum(part.kept for part in self.parts.values())

    @property
    def work(self) -> int:
        """Operations, forward and backward, without those that are repeated."""
        return sum(part.forward + part.backward for part in self.parts.values())

    @property
    def pieces(self) -> dict[str, int]:
        """The same by what computes.

        They are vision_tower, image_transform (to the fusion width, for the bridges), text_tower (with its transform),
        bridges, text_stream and image_stream (of the cross-modal layers), and heads (with poolers).
        """
        return {name: work for part in self.parts.values() for name, work in part.pieces.items()}

    @property
    def repeated(self) -> int:
        """Operations of computing again."""
        return sum(part.repeated for part in self.parts.values())

    @property
    def workspace(self) -> int:
        """Bytes that are needed beside what is kept, when most is in use.

        The backward pass goes from the heads to the towers and lets go of what it has read; where layers are computed
        again, one at a time is there as a whole.
        """
        vision, text = self.parts["vision"], self.parts["text"]
        towers = vision.kept + text.kept + self.bridged
        most = max(
            self.kept + self.parts["fusion"].largest_layer,
            towers + text.largest_layer if text.largest_layer else 0,
            towers - text.kept + vision.largest_layer if vision.largest_layer else 0,
        )
        return max(most - self.kept + self.passing, self.first_gradient)


class Texts(NamedTuple):
    """Captions of a micro-batch as lengths."""

    num_tokens: tuple[int, ...]
    """Of each, with <s> and </s>."""
    num_masked: tuple[int, ...]
    """Of these, those that are predicted."""


class _Grid(NamedTuple):
    """Some rows as attention reads them."""

    rows: int
    width: int
    tokens: int
    has_mask: bool
    is_copied: bool
    """Tokens are spread to the grid and collected from it; else they are the grid."""

    @property
    def size(self) -> int:
        return self.rows * self.width

    @property
    def copied(self) -> int:
        """Tokens that stay beside the grid that they were spread to."""
        return self.tokens if self.is_copied else 0


class _Rows(NamedTuple):
    whole: _Grid
    buckets: tuple[_Grid, ...]


def _rows(lengths: Sequence[int], cuts: Sequence[int]) -> _Rows:
    """As ``packing.Packing.layout`` lays them out."""
    length_R = np.asarray(lengths, np.int64)
    grids = []
    for start, end in [(0, len(length_R)), *zip([0, *cuts[:-1]], cuts, strict=True)]:
        part = length_R[start:end]
        width = max(1, int(part.max(initial=0)))
        is_ragged = bool((part != width).any())
        grids.append(_Grid(end - start, width, int(part.sum()), is_ragged, is_ragged))
    return _Rows(grids[0], tuple(grids[1:]))


def _padded(rows: int, width: int) -> _Rows:
    grid = _Grid(rows, width, rows * width, True, False)
    return _Rows(grid, (grid,))


@dataclass(frozen=True)
class _Layers:
    """Formulas of what all parts are made of, for states of one type and one dropout."""

    element: int
    """Bytes of an element of the states."""
    kernels: Kernels
    dropout: float
    mask_bytes: int = 1
    """Of an element of a dropout mask."""

    def states(self, rows: int, width: int) -> Work:
        """States that something reads again."""
        return Work(kept=rows * width * self.element)

    def linear(self, rows: int, inside: int, outside: int) -> Work:
        """A product; what it reads is counted where it comes from."""
        forward = 2 * rows * inside * outside
        return Work(0, forward, 2 * forward)

    def norm(self, rows: int, width: int) -> Work:
        """What it reads, and two statistics a row."""
        statistic = self.kernels.statistic_bytes or self.element
        return Work(kept=rows * (width * self.element + 2 * statistic))

    def mask(self, rows: int, width: int) -> Work:
        """Of a dropout."""
        return Work(kept=rows * width * self.mask_bytes if self.dropout else 0)

    def attention(
        self,
        own: _Grid,
        rows: int,
        keys: int,
        width: int,
        num_heads: int,
        *,
        held: int,
        copied: int = 0,
        has_mask: bool = False,
    ) -> Work:
        """The kernel with what it reads and gives.

        Args:
            own: the queries.
            rows: of queries and keys.
            keys: of a row.
            held: elements of the memory that queries, keys and values lie in.
            copied: elements that were spread to that memory, and stay.
            has_mask: some keys are padding.
        """
        shares = rows * num_heads * own.width * keys
        products = 4 * rows * own.width * keys * width
        result = rows * own.width * width * self.element
        collected = own.copied * width * self.element
        sources = copied * self.element
        if self.dropout and not self.kernels.drops_inside:  # model/cpu_attention.py
            kept = held * self.element + shares * (self.element + 1) + sources + (collected or result)
            return Work(kept, products, 2 * products)
        kept = held * self.element + result + sources + collected + 4 * rows * num_heads * own.width
        return Work(kept + (rows * keys * self.element if has_mask else 0), products, 2 * products)

    def finish(self, rows: int, width: int) -> Work:
        """Output projection, dropout, and the norm of the sum."""
        return self.linear(rows, width, width) + self.mask(rows, width) + self.norm(rows, width)

    def feed_forward(self, rows: int, width: int, inner: int) -> Work:
        """What it reads, what GELU reads and gives, dropout, and the norm of the sum."""
        kept = self.states(rows, width + 2 * inner) + self.mask(rows, width) + self.norm(rows, width)
        return kept + self.linear(rows, width, inner) + self.linear(rows, inner, width)


def count_micro_batch(
    config: ModelConfig,
    objectives: ObjectivesConfig,
    compute: ComputeConfig,
    texts: Texts,
    *,
    element_bytes: int,
    kernels: Kernels = CUDA,
    num_images: int = 0,
    num_frozen: tuple[int, int] = (0, 0),
    num_contrasted: int = 0,
) -> StepCost:
    """Count forward and backward of a micro-batch.

    Args:
        config: complete.
        element_bytes: of weights and states: 2 in bfloat16, 4 in float32.
        num_images: those of the pairs, and those that are there as negatives alone; 0: one a pair.
        num_frozen: lowest layers that are not trained, of the vision and of the text tower; -1 a whole tower.
        num_contrasted: pairs of all ranks' micro-batches, for ITC; 0: this micro-batch's.

    Raises:
        ConfigError: there is no formula for the vision tower.
    """
    return _MicroBatch(
        config,
        objectives,
        compute,
        texts,
        element_bytes,
        kernels,
        num_images or len(texts.num_tokens),
        num_frozen,
        num_contrasted or len(texts.num_tokens),
    ).cost()


class _MicroBatch:
    """The way of a micro-batch through the model, in the order of task.py, bridgetower.py and cross_modal.py."""

    def __init__(
        self,
        config: ModelConfig,
        objectives: ObjectivesConfig,
        compute: ComputeConfig,
        texts: Texts,
        element: int,
        kernels: Kernels,
        num_images: int,
        num_frozen: tuple[int, int],
        num_contrasted: int,
    ) -> None:
        if not is_clip_tower(config.vision):
            raise ConfigError(
                f"model.vision.name={config.vision.name} is a tower of timm, for whose layers there is no formula. "
                "Plan with one of CLIP's of the same size, e.g. --model.vision.name=ViT-B-16-quickgelu."
            )
        self.config, self.objectives, self.compute = config, objectives, compute
        self.num_frozen, self.num_contrasted = num_frozen, num_contrasted
        fusion, vision = config.fusion, config.vision
        self.element, self.width = element, fusion.width
        text_mask, mask = kernels.text_mask_bytes or element, kernels.mask_bytes
        if kernels.draws_again and compute.fuse_kernels:
            text_mask = mask = 0
        self.of_vision = _Layers(element, kernels, 0.0)
        self.of_text = _Layers(element, kernels, config.text.dropout, text_mask)
        self.of_fusion = _Layers(element, kernels, fusion.dropout, mask)
        self.pairs = len(texts.num_tokens)
        self.images = num_images + (0 if compute.share_images or not objectives.itm else self.pairs)
        self.positions = (config.image_size_px // vision.patch_size_px) ** 2 + 1
        # Texts in the order of their lengths, as rows.plan_rows has them.
        order = np.argsort(texts.num_tokens, kind="stable")
        self.lengths = [texts.num_tokens[place] for place in order]
        self.masked = [texts.num_masked[place] for place in order]
        self.cuts = similar(np.asarray(self.lengths, np.int64), BUCKET_TOKENS)
        if not compute.pack_text:
            self.lengths, self.cuts = [max(self.lengths)] * self.pairs, [self.pairs]
        self.kinds = [kind for kind in ("mlm", "itm") if getattr(objectives, kind)]
        self.num_texts = objectives.mlm + (objectives.itm or objectives.itc)
        self.absorbs = compute.absorb_projections and absorbs_projections(config)

    def cost(self) -> StepCost:
        """Of all parts."""
        parts = {"vision": self._vision(), "text": self._text(), "fusion": self._fusion(), "heads": self._heads()}
        fusion = self.config.fusion
        read = 1 if fusion.multi_layer_fusion else max(1, fusion.num_bridged)
        rows = self.images * self.positions + self.num_texts * sum(self.lengths)
        passing = 4 * self.pairs * len(self.kinds) * self.positions * self.width * self.element
        decoder = self.config.text.vocabulary_size * self.width * self.element if self.objectives.mlm else 0
        return StepCost(parts, read * rows * self.width * self.element, passing, decoder)

    def _states_read(self, num_layers: int) -> int:
        fusion = self.config.fusion
        return num_layers if fusion.multi_layer_fusion else max(1, fusion.num_bridged)

    def _layout(self, num_kinds: int) -> _Rows:
        """Of so many kinds of texts one after the other."""
        if not self.compute.pack_text:
            return _padded(self.pairs * num_kinds, self.lengths[0])
        return _rows(self.lengths * num_kinds, _repeated([self.cuts] * num_kinds, self.pairs))

    def _tower(
        self,
        name: str,
        layers: list[Work],
        entry: Work,
        exit_: Work,
        states: Work,
        num_frozen: int,
        unrepeated: int = 0,
    ) -> PartCost:
        """A tower of equal layers.

        Args:
            entry: before its first layer.
            exit_: behind its last layer, in any case.
            states: what enters a layer.
            num_frozen: lowest layers without a backward pass; -1 all.
            unrepeated: operations of a layer's end, whose result nothing in it reads.
        """
        count = len(layers) if num_frozen < 0 else num_frozen
        trained = layers[count:]
        forward = entry.forward + exit_.forward + sum(layer.forward for layer in layers)
        backward = exit_.backward + sum(layer.backward for layer in trained) + (0 if num_frozen else entry.backward)
        transform = exit_.forward + exit_.backward
        pieces = {"text_tower": forward + backward}
        if name == "vision":
            pieces = {"vision_tower": forward + backward - transform, "image_transform": transform}
        kept = exit_.kept + (0 if num_frozen else entry.kept)
        if name in self.compute.recompute:
            kept += (states.kept + self.of_vision.kernels.generator_bytes) * len(
                layers
            )  # checkpoints hold what enters a layer whether it is trained or not
            inner = max((layer.kept for layer in trained), default=0)
            repeated = sum(layer.forward - unrepeated for layer in trained)
            return PartCost(kept, inner, forward, backward, repeated, pieces)
        kept += sum(layer.kept for layer in trained)
        return PartCost(kept, 0, forward, backward, 0, pieces)

    def _handed_out(self, layers: _Layers, rows: int, width: int, num_layers: int, *, trained: bool) -> Work:
        """Stacked states of the layers that are read, their gate, and their transform to the fusion width."""
        fusion = self.config.fusion
        read = self._states_read(num_layers)
        work = Work()
        if fusion.multi_layer_fusion and read > 1:
            lower = (read - 1) * rows
            work += layers.states(lower, 2 * width) + layers.linear(lower, width, width)
            read = 1
        if fusion.num_layers:
            work += layers.states(read * rows, width) + layers.linear(read * rows, width, fusion.width)
            work += layers.states(read * rows, fusion.width)
        elif trained:
            work += layers.states(read * rows, width)
        return work

    def _vision(self) -> PartCost:
        layers, vision = self.of_vision, self.config.vision
        rows, width, side = self.images * self.positions, vision.width, self.config.image_size_px
        patches, pixels = self.images * (self.positions - 1), 3 * vision.patch_size_px**2
        grid = _Grid(self.images, self.positions, rows, has_mask=False, is_copied=False)
        block = (
            layers.norm(rows, width)
            + layers.states(rows, width)
            + layers.linear(rows, width, 3 * width)
            + layers.attention(
                grid,
                self.images,
                self.positions,
                width,
                vision.num_heads,
                held=3 * rows * width,
            )
            + layers.linear(rows, width, width)
            + layers.norm(rows, width)
            + layers.states(rows, width + 8 * width)
            + layers.linear(rows, width, 4 * width)
            + layers.linear(rows, 4 * width, width)
        )
        embed = layers.linear(patches, pixels, width)
        # Pixels get no gradient.
        entry = Work(3 * side**2 * self.images * self.element, embed.forward, embed.forward) + layers.norm(rows, width)
        read = self._states_read(vision.num_layers)
        is_trained = self.num_frozen[0] != -1
        exit_ = self._handed_out(layers, rows, width, vision.num_layers, trained=is_trained)
        if is_trained:
            statistics = Work(read * (layers.norm(rows, width).kept - layers.states(rows, width).kept))
            exit_ += statistics + layers.states(rows, width)  # the last norm's states; the others enter a block
        return self._tower(
            "vision",
            [block] * vision.num_layers,
            entry,
            exit_,
            layers.states(rows, width),
            self.num_frozen[0],
            unrepeated=layers.linear(rows, 4 * width, width).forward,
        )

    def _text(self) -> PartCost:
        layers, text = self.of_text, self.config.text
        grid = self._layout(self.num_texts).whole
        rows, width, inner = grid.tokens, text.width, int(encoder_config(text).intermediate_size)
        layer = (
            layers.states(rows, width)
            + layers.linear(rows, width, 3 * width)
            + layers.attention(
                grid,
                grid.rows,
                grid.width,
                width,
                text.num_heads,
                held=3 * grid.size * width,
                copied=3 * grid.copied * width,
                has_mask=grid.has_mask,
            )
            + layers.finish(rows, width)
            + layers.feed_forward(rows, width, inner)
        )
        # Ids, positions and kinds of the embedding, its norm and dropout.
        entry = Work(kept=3 * 8 * rows) + layers.norm(rows, width) + layers.mask(rows, width)
        exit_ = self._handed_out(layers, rows, width, text.num_layers, trained=self.num_frozen[1] != -1)
        return self._tower(
            "text", [layer] * text.num_layers, entry, exit_, layers.states(rows, width), self.num_frozen[1]
        )

    def _fusion(self) -> PartCost:
        fusion, layers = self.config.fusion, self.of_fusion
        kept = inner = forward = backward = repeated = 0
        pieces = dict.fromkeys(("bridges", "text_stream", "image_stream"), 0)
        passes = [self.kinds] if self.compute.joint_pass else [[kind] for kind in self.kinds]
        for kinds in passes if fusion.num_layers else []:
            layout = self._layout(len(kinds))
            tokens, rows = layout.whole.tokens, self.pairs * len(kinds)
            shared = self.images if self.compute.share_first_layer else rows
            if fusion.num_bridged:
                # The norms read states that are there, and keep their statistics.
                statistics = _statistics(layers, tokens + self.images * self.positions, fusion.width)
                kept += statistics
            for number in range(fusion.num_layers):
                works = self._fusion_layer(number, kinds, layout, rows)
                layer = sum(works, Work())
                unread = number == fusion.num_layers - 1 and kinds == ["mlm"]
                image = works[-1]
                forward, backward = forward + layer.forward, backward + layer.backward
                for name, work in zip(pieces, works, strict=True):
                    pieces[name] += work.forward + (0 if unread and work is image else work.backward)
                if unread:  # MLM reads texts
                    backward -= image.backward
                    layer = layer._replace(kept=layer.kept - image.kept)
                if "fusion" in self.compute.recompute:
                    entering = layers.states(tokens, fusion.width) + layers.states(
                        (shared if number == 0 else rows) * self.positions, fusion.width
                    )
                    kept += entering.kept + layers.kernels.generator_bytes
                    inner, repeated = max(inner, layer.kept), repeated + layer.forward
                else:
                    kept += layer.kept
        return PartCost(kept, inner, forward, backward, repeated, pieces)

    def _fusion_layer(self, number: int, kinds: list[str], layout: _Rows, rows: int) -> tuple[Work, Work, Work]:
        """Bridges, the text's layer, the image's layer."""
        fusion, layers, width = self.config.fusion, self.of_fusion, self.width
        tokens, positions = layout.whole.tokens, self.positions
        is_first = number == 0
        is_shared = is_first and self.compute.share_first_layer
        own_rows = self.images if is_shared else rows
        bridges = Work()
        if 0 < number < fusion.num_bridged:
            images = _Grid(rows, positions, rows * positions, has_mask=False, is_copied=False)
            bridges += self._bridge(layout.whole, is_image=False) + self._bridge(images, is_image=True)
        # What both layers read.
        bridges += layers.states(tokens, width) + layers.states(own_rows * positions, width)
        is_pruned = number == fusion.num_layers - 1 and self.compute.prune_last_layer
        queries = self._read(kinds) if is_pruned else layout
        text = self._text_stream(queries, layout, rows, own_rows, is_pruned=is_pruned, is_shared=is_shared)
        if is_pruned:
            image = self._image_stream_pruned(is_shared) if "itm" in kinds else Work()
        else:
            image = self._image_stream(layout.whole, rows, own_rows, is_shared=is_shared)
        return bridges, text, image

    def _read(self, kinds: list[str]) -> _Rows:
        """Tokens that are read of the last layer."""
        counts = {"mlm": self.masked if self.compute.masked_logits_only else self.lengths, "itm": [1] * self.pairs}
        cuts = {"mlm": self.cuts, "itm": [self.pairs]}
        return _rows(
            [count for kind in kinds for count in counts[kind]],
            _repeated([cuts[kind] for kind in kinds], self.pairs),
        )

    def _text_stream(
        self, queries: _Rows, layout: _Rows, rows: int, own_rows: int, *, is_pruned: bool, is_shared: bool
    ) -> Work:
        layers, width, heads = self.of_fusion, self.width, self.config.fusion.num_heads
        own, whole = queries.whole, layout.whole
        read, positions = own.tokens, self.positions
        work = layers.states(read, width) if is_pruned else Work()
        work += layers.linear(read, width, width) + layers.linear(whole.tokens, width, 2 * width)
        work += layers.attention(
            own,
            rows,
            whole.width,
            width,
            heads,
            held=(own.size + 2 * whole.size) * width,
            copied=(own.copied + 2 * whole.copied) * width,
            has_mask=whole.has_mask,
        )
        work += layers.finish(read, width) + layers.states(read, width)
        if self.absorbs:
            work += self._absorbed(queries, rows, is_shared=is_shared)
        else:
            work += layers.linear(read, width, width) + layers.linear(own_rows * positions, width, 2 * width)
            held = 2 * rows * positions * width
            work += layers.attention(
                own,
                rows,
                positions,
                width,
                heads,
                held=own.size * width + held,
                copied=own.copied * width,
            )
            work += Work(kept=2 * width * width * self.element)  # the weights of keys and values, joined
        work += layers.finish(read, width)
        return work + layers.feed_forward(read, width, 4 * width)

    def _absorbed(self, queries: _Rows, rows: int, *, is_shared: bool) -> Work:
        """Queries moved to the images' states instead of projections of these."""
        layers, width, heads = self.of_fusion, self.width, self.config.fusion.num_heads
        read = queries.whole.tokens
        # Queries; these moved to the states of images, by head; sums of states by head; what these are projected to.
        work = layers.linear(read, width, width) + layers.linear(read, width, width) + layers.linear(read, width, width)
        work += layers.states(read, 2 * width + 2 * heads * width)
        if is_shared:
            work += layers.states(rows * self.positions, width)  # the image of each row
        for grid in queries.buckets:
            shares = grid.size * heads
            work += layers.states(grid.size if grid.is_copied else 0, heads * width)
            work += layers.states(shares, self.positions) + layers.mask(shares, self.positions)
            if layers.dropout:
                work += layers.states(shares, self.positions)
            products = 4 * shares * self.positions * width
            work += Work(0, products, 2 * products)
        return work

    def _image_stream(self, texts: _Grid, rows: int, own_rows: int, *, is_shared: bool) -> Work:
        layers, width, heads, positions = self.of_fusion, self.width, self.config.fusion.num_heads, self.positions
        # Without dropout, rows of an image share its self-attention.
        parts = is_shared and bool(layers.dropout)
        self_rows = rows if parts or not is_shared else own_rows
        grid = _Grid(self_rows, positions, self_rows * positions, has_mask=False, is_copied=False)
        held = 3 * grid.size * width
        work = layers.linear(own_rows * positions, width, 3 * width)
        work += Work(kept=3 * width * width * self.element)  # the weights of queries, keys and values, joined
        work += layers.attention(grid, self_rows, positions, width, heads, held=held)
        work += layers.finish(grid.size, width) + layers.states(grid.size, width)
        # Cross-attention.
        work += layers.linear(grid.size, width, width) + layers.linear(texts.tokens, width, 2 * width)
        whole = grid._replace(rows=rows, tokens=rows * positions)
        work += layers.attention(
            whole,
            rows,
            texts.width,
            width,
            heads,
            held=(whole.size + 2 * texts.size) * width,
            copied=2 * texts.copied * width,
            has_mask=texts.has_mask,
        )
        work += layers.finish(whole.size, width)
        return work + layers.feed_forward(whole.size, width, 4 * width)

    def _image_stream_pruned(self, is_shared: bool) -> Work:
        """Class tokens of ITM's rows alone."""
        layers, width, heads, positions = self.of_fusion, self.width, self.config.fusion.num_heads, self.positions
        rows, texts = self.pairs, self._layout(1).whole
        grid = _Grid(rows, 1, rows, has_mask=False, is_copied=False)
        keys = 2 * rows * positions * width
        work = Work(kept=2 * width * width * self.element)
        if is_shared:
            work += layers.states(rows * positions, width)
        work += layers.states(rows, width) + layers.linear(rows, width, width)
        work += layers.linear(rows * positions, width, 2 * width)
        work += layers.attention(grid, rows, positions, width, heads, held=rows * width + keys)
        work += layers.finish(rows, width) + layers.states(rows, width)
        work += layers.linear(rows, width, width) + layers.linear(texts.tokens, width, 2 * width)
        work += layers.attention(
            grid,
            rows,
            texts.width,
            width,
            heads,
            held=(rows + 2 * texts.size) * width,
            copied=2 * texts.copied * width,
            has_mask=texts.has_mask,
        )
        work += layers.finish(rows, width)
        return work + layers.feed_forward(rows, width, 4 * width)

    def _bridge(self, grid: _Grid, *, is_image: bool) -> Work:
        """What a bridge keeps beside its result, in the order of the paper's Table 1."""
        layers, width, form, rows = self.of_fusion, self.width, self.config.fusion.bridge, grid.tokens
        # The tower's state is a copy for images, whose rows are picked, and a part of what is there for texts.
        tower, cross = layers.states(rows if is_image else 0, width), layers.states(rows, width)
        both = layers.states(rows, 2 * width)
        norm = layers.norm(rows, width)
        if form == "add":
            return norm
        if form in ("product", "interpolate"):
            return tower + cross + norm
        if form == "gated_interpolate":
            gate = layers.linear(rows, 2 * width, width)
            return both + gate + layers.states(rows, 2 * width) + tower + cross + norm
        if form in ("linear_concat", "linear_residual"):
            return both + layers.linear(rows, 2 * width, width) + norm
        if form == "mlp_concat":
            inner = layers.linear(rows, 2 * width, 2 * width) + layers.norm(rows, 2 * width)
            return both + inner + layers.states(rows, 4 * width) + layers.linear(rows, 2 * width, width) + norm
        work = tower + cross + layers.linear(rows, width, 3 * width)
        keys = 2 * grid.size * width
        work += layers.attention(
            grid,
            grid.rows,
            grid.width,
            width,
            self.config.fusion.num_heads,
            held=grid.size * width + keys,
            copied=3 * grid.copied * width,
            has_mask=grid.has_mask and self.config.fusion.bridge_masks_padding,
        )
        work += layers.finish(rows, width)
        if is_image:
            work += Work(kept=2 * width * width * self.element)
        if form == "cross_attention_ffn":
            work += layers.feed_forward(rows, width, 4 * width)
        return work

    def _heads(self) -> PartCost:
        layers, config, width = self.of_fusion, self.config, self.width
        work = Work()
        if self.objectives.mlm:
            read = sum(self.masked) if self.compute.masked_logits_only else sum(self.lengths)
            vocabulary = config.text.vocabulary_size
            work += layers.states(read, 3 * width) + layers.norm(read, width)
            work += layers.linear(read, width, width) + layers.linear(read, width, vocabulary)
            work += Work(kept=4 * sum(self.masked) * vocabulary)  # logarithms of probabilities, in float32
        if self.objectives.itm:
            work += layers.states(self.pairs, 4 * width)
            work += layers.linear(self.pairs, width, 2 * width) + layers.linear(self.pairs, 2 * width, 2)
        if self.objectives.itc:
            contrastive = config.heads.itc_width
            work += layers.states(self.pairs, config.text.width + config.vision.width)
            work += layers.linear(self.pairs, config.text.width, contrastive)
            work += layers.linear(self.pairs, config.vision.width, contrastive)
            scores = self.pairs * self.num_contrasted
            # Embeddings before and after their norm, those of all ranks; scores, logarithms and targets: float32.
            work += Work(kept=4 * (4 * self.pairs + 2 * self.num_contrasted) * contrastive + 4 * 5 * scores)
            work += layers.linear(self.pairs, contrastive, 2 * self.num_contrasted)
        pieces = {"heads": work.forward + work.backward}
        return PartCost(work.kept, 0, work.forward, work.backward, 0, pieces)


def _statistics(layers: _Layers, rows: int, width: int) -> int:
    return layers.norm(rows, width).kept - layers.states(rows, width).kept


def _repeated(cuts: Sequence[Sequence[int]], num_pairs: int) -> list[int]:
    return [num_pairs * number + cut for number, part in enumerate(cuts) for cut in part]


def typical_texts(pairs: int, mean_tokens: float, most: int, masked_share: float) -> Texts:
    """Captions as those of the corpora: lengths are log-normal, evenly spread over their distribution.

    Args:
        mean_tokens: with <s> and </s>.
        most: longer ones lose their end.
        masked_share: of words.
    """
    normal = statistics.NormalDist(math.log(mean_tokens) - _SPREAD**2 / 2, _SPREAD)
    drawn = [math.exp(normal.inv_cdf((number + 0.5) / pairs)) for number in range(pairs)]
    # Rounded so that the sum stays, as far as a caption has at least a word.
    ends = [round(end) for end in itertools.accumulate(drawn)]
    lengths = [min(most, max(3, end - start)) for start, end in zip([0, *ends], ends, strict=False)]
    ends = [round(end) for end in itertools.accumulate(masked_share * (length - 2) for length in lengths)]
    return Texts(tuple(lengths), tuple(end - start for start, end in zip([0, *ends], ends, strict=False)))


def count_published_step(config: ModelConfig, objectives: ObjectivesConfig) -> float:
    """Operations of a pair in the published step: captions of 50 tokens, and no work saved."""
    tokens = min(PUBLISHED_TOKENS, config.text.max_tokens)
    texts = Texts((tokens,) * 20, tuple(7 + number % 2 for number in range(20)))
    return count_micro_batch(config, objectives, PLAIN, texts, element_bytes=4).work / 20
