"""Cost of a bridge of each form: what it keeps beside its result, in the order of the paper's Table 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bridgetower.config.model import FusionConfig
from bridgetower.cost.grids import Grid
from bridgetower.cost.layers import LayerCosts
from bridgetower.cost.unknown import no_formula
from bridgetower.cost.work import Work

FILE = "bridgetower/cost/bridges.py"


class _Bridge:
    """One bridge of one modality, and the terms that its formula is made of."""

    def __init__(self, config: FusionConfig, costs: LayerCosts, grid: Grid, *, is_image: bool) -> None:
        self.config, self.costs, self.grid, self.is_image = config, costs, grid, is_image
        self.rows, self.width = grid.tokens, config.width
        self.norm = costs.norm(self.rows, self.width)
        # Images are picked for each row, which copies the tower's states; those of texts are a view.
        self.tower = costs.states(self.rows if is_image else 0, self.width)
        self.cross = costs.states(self.rows, self.width)
        self.concatenated = costs.states(self.rows, 2 * self.width)


def _add(bridge: _Bridge) -> Work:
    return bridge.norm


def _product(bridge: _Bridge) -> Work:
    return bridge.tower + bridge.cross + bridge.norm


def _gated_interpolate(bridge: _Bridge) -> Work:
    costs, rows, width = bridge.costs, bridge.rows, bridge.width
    gate = costs.linear(rows, 2 * width, width) + costs.states(rows, 2 * width)
    return bridge.concatenated + gate + bridge.tower + bridge.cross + bridge.norm


def _linear(bridge: _Bridge) -> Work:
    return bridge.concatenated + bridge.costs.linear(bridge.rows, 2 * bridge.width, bridge.width) + bridge.norm


def _mlp_concat(bridge: _Bridge) -> Work:
    costs, rows, width = bridge.costs, bridge.rows, bridge.width
    inner = costs.linear(rows, 2 * width, 2 * width) + costs.norm(rows, 2 * width) + costs.states(rows, 4 * width)
    return bridge.concatenated + inner + costs.linear(rows, 2 * width, width) + bridge.norm


def _cross_attention(bridge: _Bridge) -> Work:
    costs, grid, width = bridge.costs, bridge.grid, bridge.width
    work = bridge.tower + bridge.cross + costs.linear(bridge.rows, width, 3 * width)
    work += costs.attention(
        grid,
        grid.rows,
        grid.width,
        width,
        bridge.config.num_heads,
        held=3 * grid.size * width,
        copied=3 * grid.copied * width,
        has_mask=grid.has_mask and bridge.config.bridge_masks_padding,
    )
    if bridge.is_image:  # the weights of keys and values, concatenated
        work += Work(kept=2 * width * width * costs.element)
    return work + costs.finish(bridge.rows, width)


def _cross_attention_ffn(bridge: _Bridge) -> Work:
    return _cross_attention(bridge) + bridge.costs.feed_forward(bridge.rows, bridge.width, 4 * bridge.width)


_FORMULAS: Mapping[str, Callable[[_Bridge], Work]] = {
    "add": _add,
    "product": _product,
    "interpolate": _product,
    "gated_interpolate": _gated_interpolate,
    "linear_concat": _linear,
    "mlp_concat": _mlp_concat,
    "cross_attention": _cross_attention,
    "cross_attention_ffn": _cross_attention_ffn,
    "linear_residual": _linear,
}


def bridge_cost(config: FusionConfig, costs: LayerCosts, grid: Grid, *, is_image: bool) -> Work:
    """Return the cost of one bridge.

    Args:
        grid: rows of the bridge's modality.

    Raises:
        ConfigError: there is no formula for the form.
    """
    if config.bridge not in _FORMULAS:
        raise no_formula("bridge form", config.bridge, FILE, _FORMULAS)
    return _FORMULAS[config.bridge](_Bridge(config, costs, grid, is_image=is_image))
