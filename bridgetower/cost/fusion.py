"""Cost of the cross-modal encoder: bridges, and layers of both streams.

Rows that see the same image share what no text has touched yet: the projections of the first layer. Of the last layer
only what a loss reads is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from bridgetower.cost.bridges import bridge_cost
from bridgetower.cost.grids import Grid, RowLayout, dense
from bridgetower.cost.shapes import StepShapes
from bridgetower.cost.work import PartCost, Work


class _LayerCost(NamedTuple):
    """Cost of one cross-modal layer, by component."""

    bridges: Work
    """Bridges of both modalities, and the states that both streams of the layer read."""
    text_stream: Work
    image_stream: Work


def fusion_cost(shapes: StepShapes) -> PartCost:
    """Return the cost of all cross-modal layers, which compute the rows of all objectives in one pass."""
    fusion, costs, positions = shapes.config.fusion, shapes.fusion_costs, shapes.positions
    kept = largest_layer = forward = backward = repeated = 0
    pieces = dict.fromkeys(_LayerCost._fields, 0)
    layout = shapes.layout_texts(len(shapes.row_objectives))
    if fusion.num_bridged:
        # The first layer has plain norms instead of bridges, whose input the towers' transforms keep.
        kept += costs.statistics(layout.whole.tokens + shapes.num_images * positions).kept
    for layer_index in range(fusion.num_layers):
        by_component = _layer_cost(shapes, layer_index, layout)
        layer = sum(by_component, Work())
        forward, backward = forward + layer.forward, backward + layer.backward
        for name, work in zip(pieces, by_component, strict=True):
            pieces[name] += work.forward + work.backward
        if "fusion" in shapes.recompute:
            image_rows = shapes.num_images if layer_index == 0 else shapes.rows
            entering = costs.states(layout.whole.tokens + image_rows * positions, fusion.width)
            kept += entering.kept + costs.memory.generator_bytes
            largest_layer, repeated = max(largest_layer, layer.kept), repeated + layer.forward
        else:
            kept += layer.kept
    return PartCost(kept, largest_layer, forward, backward, repeated, pieces)


def _layer_cost(shapes: StepShapes, layer_index: int, layout: RowLayout) -> _LayerCost:
    fusion, costs, positions = shapes.config.fusion, shapes.fusion_costs, shapes.positions
    is_first, is_last = layer_index == 0, layer_index == fusion.num_layers - 1
    image_rows = shapes.num_images if is_first else shapes.rows
    bridges = Work()
    if 0 < layer_index < fusion.num_bridged:
        bridges += bridge_cost(fusion, costs, layout.whole, is_image=False)
        bridges += bridge_cost(fusion, costs, dense(shapes.rows, positions), is_image=True)
    bridges += costs.states(layout.whole.tokens + image_rows * positions, fusion.width)
    queries = shapes.layout_read_tokens() if is_last else layout
    text = _text_stream(shapes, queries, layout.whole, image_rows, is_first=is_first, is_last=is_last)
    if not is_last:
        image = _image_stream(shapes, layout.whole, image_rows, is_first=is_first)
    elif "itm" in shapes.row_objectives:
        image = _last_image_stream(shapes, is_first=is_first)
    else:
        image = Work()  # MLM reads no image state
    return _LayerCost(bridges, text, image)


def _text_stream(
    shapes: StepShapes, queries: RowLayout, texts: Grid, image_rows: int, *, is_first: bool, is_last: bool
) -> Work:
    """Return the cost of the text stream of one layer.

    Args:
        queries: the tokens whose state is computed.
        texts: all tokens, which self-attention reads.
        image_rows: rows whose image states are projected to keys and values.
    """
    costs, width, num_heads = shapes.fusion_costs, shapes.config.fusion.width, shapes.config.fusion.num_heads
    grid, rows, positions = queries.whole, shapes.rows, shapes.positions
    num_read = grid.tokens
    work = costs.states(num_read, width) if is_last else Work()
    work += costs.linear(num_read, width, width) + costs.linear(texts.tokens, width, 2 * width)
    work += costs.attention(
        grid,
        rows,
        texts.width,
        width,
        num_heads,
        held=(grid.size + 2 * texts.size) * width,
        copied=(grid.copied + 2 * texts.copied) * width,
        has_mask=texts.has_mask,
    )
    work += costs.finish(num_read, width) + costs.states(num_read, width)
    if shapes.absorbs:
        work += _absorbed_attention(shapes, queries, is_first=is_first)
    else:
        work += costs.linear(num_read, width, width) + costs.linear(image_rows * positions, width, 2 * width)
        held = (grid.size + 2 * rows * positions) * width
        work += costs.attention(grid, rows, positions, width, num_heads, held=held, copied=grid.copied * width)
        work += _joint_weights(shapes, 2)
    return work + costs.finish(num_read, width) + costs.feed_forward(num_read, width, 4 * width)


def _absorbed_attention(shapes: StepShapes, queries: RowLayout, *, is_first: bool) -> Work:
    """Return the cost of attending to images whose key and value projections are moved to the queries."""
    costs, width, num_heads = shapes.fusion_costs, shapes.config.fusion.width, shapes.config.fusion.num_heads
    num_read, positions = queries.whole.tokens, shapes.positions
    # Three matmuls: queries; queries moved to the space of image states, head by head; weighted sums of image states,
    # head by head, moved back.
    work = costs.linear(num_read, width, 3 * width)
    work += costs.states(num_read, 2 * width + 2 * num_heads * width)
    if is_first:
        work += costs.states(shapes.rows * positions, width)  # the image of each row
    for grid in queries.buckets:
        num_queries = grid.size * num_heads
        work += costs.states(grid.size if grid.is_copied else 0, num_heads * width)
        work += costs.states(num_queries, positions) + costs.mask(num_queries, positions)
        if costs.dropout:
            work += costs.states(num_queries, positions)
        forward = 4 * num_queries * positions * width
        work += Work(0, forward, 2 * forward)
    return work


def _image_stream(shapes: StepShapes, texts: Grid, image_rows: int, *, is_first: bool) -> Work:
    """Return the cost of the image stream of one layer.

    Args:
        texts: all tokens, which cross-attention reads.
        image_rows: rows whose image states enter the layer.
    """
    costs, width, num_heads = shapes.fusion_costs, shapes.config.fusion.width, shapes.config.fusion.num_heads
    positions, rows = shapes.positions, shapes.rows
    # Rows of one image share its self-attention, unless each row has its own dropout.
    self_rows = image_rows if is_first and not costs.dropout else rows
    grid = dense(self_rows, positions)
    work = costs.linear(image_rows * positions, width, 3 * width) + _joint_weights(shapes, 3)
    work += costs.attention(grid, self_rows, positions, width, num_heads, held=3 * grid.size * width)
    work += costs.finish(grid.size, width) + costs.states(grid.size, width)
    work += costs.linear(grid.size, width, width) + costs.linear(texts.tokens, width, 2 * width)
    queries = dense(rows, positions)
    work += costs.attention(
        queries,
        rows,
        texts.width,
        width,
        num_heads,
        held=(queries.size + 2 * texts.size) * width,
        copied=2 * texts.copied * width,
        has_mask=texts.has_mask,
    )
    return work + costs.finish(queries.size, width) + costs.feed_forward(queries.size, width, 4 * width)


def _last_image_stream(shapes: StepShapes, *, is_first: bool) -> Work:
    """Return the cost of the last layer's image stream: the class tokens of ITM's rows alone."""
    costs, width, num_heads = shapes.fusion_costs, shapes.config.fusion.width, shapes.config.fusion.num_heads
    positions, rows, texts = shapes.positions, shapes.num_pairs, shapes.layout_texts(1).whole
    queries = dense(rows, 1)
    work = _joint_weights(shapes, 2)
    if is_first:
        work += costs.states(rows * positions, width)  # the image of each row
    work += costs.states(rows, width) + costs.linear(rows, width, width)
    work += costs.linear(rows * positions, width, 2 * width)
    work += costs.attention(queries, rows, positions, width, num_heads, held=(rows + 2 * rows * positions) * width)
    work += costs.finish(rows, width) + costs.states(rows, width)
    work += costs.linear(rows, width, width) + costs.linear(texts.tokens, width, 2 * width)
    work += costs.attention(
        queries,
        rows,
        texts.width,
        width,
        num_heads,
        held=(rows + 2 * texts.size) * width,
        copied=2 * texts.copied * width,
        has_mask=texts.has_mask,
    )
    return work + costs.finish(rows, width) + costs.feed_forward(rows, width, 4 * width)


def _joint_weights(shapes: StepShapes, num_projections: int) -> Work:
    """Return the cost of a copy of projections' weights, concatenated so that one matmul computes them all."""
    return Work(kept=num_projections * shapes.config.fusion.width**2 * shapes.fusion_costs.element)
