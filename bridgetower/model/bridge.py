"""Bridges, which join the state of a tower layer with the state of the cross-modal layer before.

The nine forms of the paper's Table 1. y is the tower's state, x the cross-modal one, W a matrix with a bias; LN has
epsilon 1e-5. Source: arXiv 2206.08657, Table 1; for what the paper leaves open (the order [y; x], the inner norm of
mlp_concat, initial values) the authors' own code in transformers pull request 20775.

States belong to images, (R, P, D), or to packed captions, (T, D) with a layout; N stands for the positions of both.
Shapes: R rows, P image positions, T tokens of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.model import FusionConfig
from bridgetower.kernels.layout import Layout
from bridgetower.kernels.ops import Ops
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.init import ZeroInitLinear

# Epsilon of all bridges and of the norms before the first cross-modal layer (fusion.layer_norm_eps is another).
BRIDGE_EPS = 1e-5


class Bridge(nn.Module):
    """Joins the two states in one modality before one cross-modal layer."""

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Return the joined states, in the shape of both inputs.

        Args:
            tower_ND: y.
            cross_ND: x.
            layout: where tokens lie; None for images.
        """
        raise NotImplementedError  # abstract


class NormedBridge(Bridge):
    """LN(join(y, x)): every form without cross-attention."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the norm that is applied to the result of ``join``."""
        super().__init__()
        self.ops = ops
        self.norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Join position by position, and norm."""
        joined: Tensor = self.norm(self.join(tower_ND, cross_ND))
        return joined

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Return the joined states before the norm."""
        raise NotImplementedError  # abstract


class AddBridge(NormedBridge):
    """(a) LN(x + y), the published model."""

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Add and norm."""
        return self.ops.add_norm(tower_ND, cross_ND, self.norm)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Add."""
        return tower_ND + cross_ND


class ProductBridge(NormedBridge):
    """(b) LN(x * y)."""

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Multiply."""
        return tower_ND * cross_ND


class InterpolateBridge(NormedBridge):
    """(c) LN(beta * x + (1 - beta) * y), beta a learned vector that starts at 0.5."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.beta = nn.Parameter(torch.full((config.width,), 0.5))

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Mix, channel by channel."""
        return (1 - self.beta) * tower_ND + self.beta * cross_ND


class GatedInterpolateBridge(NormedBridge):
    """(d) LN(g * x + (1 - g) * y) with g = sigmoid(W [y; x])."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.gate = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Mix, position by position and channel by channel."""
        gate_ND = self.gate(torch.cat([tower_ND, cross_ND], dim=-1)).sigmoid()
        mixed: Tensor = (1 - gate_ND) * tower_ND + gate_ND * cross_ND
        return mixed


class LinearConcatBridge(NormedBridge):
    """(e) LN(W [y; x])."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.linear = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Concatenate and project."""
        joined: Tensor = self.linear(torch.cat([tower_ND, cross_ND], dim=-1))
        return joined


class MLPConcatBridge(NormedBridge):
    """(f) LN(W_2 GELU(LN(W_1 [y; x]))), both inner sizes 2 D."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.expand = nn.Linear(2 * config.width, 2 * config.width)
        self.inner_norm = nn.LayerNorm(2 * config.width, eps=BRIDGE_EPS)
        self.contract = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Concatenate and project twice."""
        inner_NE = self.inner_norm(self.expand(torch.cat([tower_ND, cross_ND], dim=-1)))
        joined: Tensor = self.contract(F.gelu(inner_NE))
        return joined


class LinearResidualBridge(NormedBridge):
    """(i) LN(x + y + W [x; y]). W and its bias start at zero, so that the bridge starts as (a)."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.linear = ZeroInitLinear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Add, and correct the sum."""
        joined: Tensor = cross_ND + tower_ND + self.linear(torch.cat([cross_ND, tower_ND], dim=-1))
        return joined


class CrossAttentionBridge(Bridge):
    """(g) Attention from x to y of the same modality, with the residual and norm of a cross-modal layer."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__()
        self.attention = Attention(config, ops)
        self.masks_padding = config.bridge_masks_padding

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Attend to y. Without ``bridge_masks_padding`` padding is attended to, as in the authors' code."""
        joined: Tensor = self.attention(cross_ND, tower_ND, layout, layout, sees_padding=not self.masks_padding)
        return joined


class CrossAttentionFFNBridge(CrossAttentionBridge):
    """(h) Cross-attention as in (g), with a feed-forward sublayer after it."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build the layers."""
        super().__init__(config, ops)
        self.feed_forward = FeedForward(config, ops)

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Attend, then transform."""
        joined: Tensor = self.feed_forward(super().forward(tower_ND, cross_ND, layout))
        return joined


_FORMS: dict[str, Callable[[FusionConfig, Ops], Bridge]] = {
    "add": AddBridge,
    "product": ProductBridge,
    "interpolate": InterpolateBridge,
    "gated_interpolate": GatedInterpolateBridge,
    "linear_concat": LinearConcatBridge,
    "mlp_concat": MLPConcatBridge,
    "cross_attention": CrossAttentionBridge,
    "cross_attention_ffn": CrossAttentionFFNBridge,
    "linear_residual": LinearResidualBridge,
}


def build_bridge(config: FusionConfig, ops: Ops) -> Bridge:
    """Return a new bridge of the form that ``config.bridge`` names."""
    return _FORMS[config.bridge](config, ops)
