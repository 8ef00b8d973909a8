"""Cost of the vision tower and the text tower, each with the transform of its bridged states to the fusion width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bridgetower.cost.layers import LayerCosts
from bridgetower.cost.shapes import StepShapes
from bridgetower.cost.sizes import mlp_width_of_vision, num_read_states
from bridgetower.cost.work import PartCost, Work


class CountedVision(NamedTuple):
    """A vision tower without a formula, counted by running it on one image."""

    positions: int
    """Positions of the image, class token and registers included."""
    forward: int
    """Operations of the forward pass, without the transform."""
    backward: int
    """Operations of the backward pass."""


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """A tower of equal layers."""

    num_layers: int
    layer: Work
    entry: Work
    """Cost of what stands before the first layer."""
    transform: Work
    """Cost of what stands behind the last layer, which is computed and kept whether the tower is trained or not."""
    states: Work
    """Cost of the states that enter a layer."""
    num_frozen: int
    """Lowest layers without a backward pass; -1 is all of them."""
    unrepeated: int = 0
    """Operations at the end of a layer that recomputing leaves out, because nothing in the layer reads their result."""

    def cost(self, *, is_recomputed: bool, generator_bytes: int) -> PartCost:
        num_trained = 0 if self.num_frozen < 0 else max(0, self.num_layers - self.num_frozen)
        forward = self.entry.forward + self.transform.forward + self.num_layers * self.layer.forward
        backward = self.transform.backward + num_trained * self.layer.backward
        kept = self.transform.kept
        if not self.num_frozen:
            backward, kept = backward + self.entry.backward, kept + self.entry.kept
        if not is_recomputed:
            return PartCost(kept + num_trained * self.layer.kept, 0, forward, backward, 0, {})
        # A checkpoint holds what enters a layer whether the layer is trained or not.
        kept += self.num_layers * (self.states.kept + generator_bytes)
        largest_layer = self.layer.kept if num_trained else 0
        repeated = num_trained * (self.layer.forward - self.unrepeated)
        return PartCost(kept, largest_layer, forward, backward, repeated, {})


def vision_cost(shapes: StepShapes) -> PartCost:
    """Return the cost of the vision tower, which runs once per image, and of its transform."""
    costs, vision = shapes.vision_costs, shapes.config.vision
    grid, width, mlp_width = shapes.image_grid, vision.width, mlp_width_of_vision(vision)
    rows, side = grid.tokens, shapes.config.image_size_px
    block = costs.norm(rows, width) + costs.states(rows, width) + costs.linear(rows, width, 3 * width)
    block += costs.attention(grid, grid.rows, grid.width, width, vision.num_heads, held=3 * rows * width)
    block += costs.linear(rows, width, width) + costs.norm(rows, width)
    block += costs.states(rows, width + 2 * mlp_width)
    last_matmul = costs.linear(rows, mlp_width, width)
    block += costs.linear(rows, width, mlp_width) + last_matmul
    embedding = costs.linear(grid.rows * (grid.width - 1), 3 * vision.patch_size_px**2, width)
    # Pixels get no gradient, so the backward pass of the patch embedding is one matmul.
    entry = Work(3 * side**2 * grid.rows * costs.element, embedding.forward, embedding.forward)
    transform = _image_transform(shapes)
    tower = _Tower(
        num_layers=vision.num_layers,
        layer=block,
        entry=entry + costs.norm(rows, width),
        transform=transform,
        states=costs.states(rows, width),
        num_frozen=shapes.num_frozen[0],
        unrepeated=last_matmul.forward,
    )
    part = tower.cost(is_recomputed="vision" in shapes.recompute, generator_bytes=costs.memory.generator_bytes)
    return _name_vision_pieces(part, transform)


def counted_vision_cost(shapes: StepShapes, counted: CountedVision) -> PartCost:
    """Return the operations of a vision tower without a formula, and of its transform. The bytes are not counted."""
    transform = _image_transform(shapes)
    forward = shapes.num_images * counted.forward + transform.forward
    backward = shapes.num_images * counted.backward + transform.backward
    return _name_vision_pieces(PartCost(0, 0, forward, backward, 0, {}), transform)


def _name_vision_pieces(part: PartCost, transform: Work) -> PartCost:
    of_transform = transform.forward + transform.backward
    tower = part.forward + part.backward - of_transform
    return part._replace(pieces={"vision_tower": tower, "image_transform": of_transform})


def _image_transform(shapes: StepShapes) -> Work:
    costs, vision = shapes.vision_costs, shapes.config.vision
    rows, is_trained = shapes.image_grid.tokens, shapes.num_frozen[0] != -1
    work = _transform(shapes, costs, rows, vision.width, vision.num_layers, is_trained=is_trained)
    if is_trained:
        # The final norm of every state that is read; only the last layer's states do not enter another block.
        num_read = num_read_states(shapes.config, vision.num_layers)
        work += Work(num_read * costs.statistics(rows).kept) + costs.states(rows, vision.width)
    return work


def text_cost(shapes: StepShapes) -> PartCost:
    """Return the cost of the text tower, which reads every version of the captions, and of its transform."""
    costs, text = shapes.text_costs, shapes.config.text
    grid = shapes.layout_texts(shapes.num_texts).whole
    rows, width = grid.tokens, text.width
    layer = costs.states(rows, width) + costs.linear(rows, width, 3 * width)
    layer += costs.attention(
        grid,
        grid.rows,
        grid.width,
        width,
        text.num_heads,
        held=3 * grid.size * width,
        copied=3 * grid.copied * width,
        has_mask=grid.has_mask,
    )
    layer += costs.finish(rows, width) + costs.feed_forward(rows, width, shapes.text_mlp_width)
    # int64 token ids, position ids and token types of the embedding, its norm and its dropout.
    entry = Work(kept=3 * 8 * rows) + costs.norm(rows, width) + costs.mask(rows, width)
    is_trained = shapes.num_frozen[1] != -1
    tower = _Tower(
        num_layers=text.num_layers,
        layer=layer,
        entry=entry,
        transform=_transform(shapes, costs, rows, width, text.num_layers, is_trained=is_trained),
        states=costs.states(rows, width),
        num_frozen=shapes.num_frozen[1],
    )
    part = tower.cost(is_recomputed="text" in shapes.recompute, generator_bytes=costs.memory.generator_bytes)
    return part._replace(pieces={"text_tower": part.forward + part.backward})


def _transform(
    shapes: StepShapes, costs: LayerCosts, rows: int, width: int, num_layers: int, *, is_trained: bool
) -> Work:
    """Return the cost of the stacked states that are read, METER's gate, and the transform to the fusion width."""
    fusion = shapes.config.fusion
    num_read = num_read_states(shapes.config, num_layers)
    work = Work()
    if fusion.multi_layer_fusion and num_read > 1:
        lower = (num_read - 1) * rows
        work += costs.states(lower, 2 * width) + costs.linear(lower, width, width)
        num_read = 1
    if fusion.num_layers:
        work += costs.states(num_read * rows, width) + costs.linear(num_read * rows, width, fusion.width)
        work += costs.states(num_read * rows, fusion.width)
    elif is_trained:
        work += costs.states(num_read * rows, width)
    return work
