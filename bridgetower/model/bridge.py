"""Bridges: how the state of a tower layer joins the state of the cross-modal layer before.

The nine forms of the paper's Table 1. y is the tower's state, x the cross-modal one, W a matrix with a bias; LN has
epsilon 1e-5. Source: arXiv 2206.08657, Table 1, and for what the paper leaves open (the order [y; x], the inner norm of
mlp_concat, starting values) the authors' own code in transformers pull request 20775.

States are of images, (R, P, D), or of packed texts, (T, D) with a layout; N stands for either's positions. Shapes:
R rows, P image positions, T tokens of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.model import FusionConfig
from bridgetower.kernels.ops import add_norm
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.init import ZeroInitLinear
from bridgetower.model.packed import Layout

# Of all bridges and of the norms before the first cross-modal layer (not fusion.layer_norm_eps).
BRIDGE_EPS = 1e-5


class Bridge(nn.Module):
    """Joins the two states in one modality before one cross-modal layer."""

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Join them.

        Args:
            tower_ND: y.
            cross_ND: x.
            layout: where tokens stand; None for images.

        Returns: their shape.
        """
        raise NotImplementedError  # abstract


class NormedBridge(Bridge):
    """LN(join(y, x)): all forms but those with cross-attention."""

    def __init__(self, config: FusionConfig) -> None:
        """Build the norm."""
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Join position by position."""
        joined: Tensor = self.norm(self.join(tower_ND, cross_ND))
        return joined

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """What is normed."""
        raise NotImplementedError  # abstract


class AddBridge(NormedBridge):
    """(a) LN(x + y), the published model."""

    uses_kernels = True

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Add and norm."""
        return add_norm(tower_ND, cross_ND, self.norm, kernels=self.uses_kernels)

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

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.beta = nn.Parameter(torch.full((config.width,), 0.5))

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Mix, channel by channel."""
        return (1 - self.beta) * tower_ND + self.beta * cross_ND


class GatedInterpolateBridge(NormedBridge):
    """(d) LN(g * x + (1 - g) * y) with g = sigmoid(W [y; x])."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.gate = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Mix, position by position and channel by channel."""
        gate_ND = self.gate(torch.cat([tower_ND, cross_ND], dim=-1)).sigmoid()
        mixed: Tensor = (1 - gate_ND) * tower_ND + gate_ND * cross_ND
        return mixed


class LinearConcatBridge(NormedBridge):
    """(e) LN(W [y; x])."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.linear = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Concatenate and project."""
        joined: Tensor = self.linear(torch.cat([tower_ND, cross_ND], dim=-1))
        return joined


class MLPConcatBridge(NormedBridge):
    """(f) LN(W_2 GELU(LN(W_1 [y; x]))), both inner sizes 2 D."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.expand = nn.Linear(2 * config.width, 2 * config.width)
        self.inner_norm = nn.LayerNorm(2 * config.width, eps=BRIDGE_EPS)
        self.contract = nn.Linear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Concatenate and project twice."""
        inner_NE = self.inner_norm(self.expand(torch.cat([tower_ND, cross_ND], dim=-1)))
        joined: Tensor = self.contract(F.gelu(inner_NE))
        return joined


class LinearResidualBridge(NormedBridge):
    """(i) LN(x + y + W [x; y]), W and its bias zero at first, so that it starts as (a)."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.linear = ZeroInitLinear(2 * config.width, config.width)

    def join(self, tower_ND: Tensor, cross_ND: Tensor) -> Tensor:
        """Add, and correct the sum."""
        joined: Tensor = cross_ND + tower_ND + self.linear(torch.cat([cross_ND, tower_ND], dim=-1))
        return joined


class CrossAttentionBridge(Bridge):
    """(g) Attention from x to y of the same modality, with the residual and norm of a cross-modal layer."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.attention = Attention(config)
        self.masks_padding = config.bridge_masks_padding

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Attend; the authors' code also looked at padding, which makes the result depend on how long that is."""
        joined: Tensor = self.attention(cross_ND, tower_ND, layout, layout, sees_padding=not self.masks_padding)
        return joined


class CrossAttentionFFNBridge(CrossAttentionBridge):
    """(h) The same with a feed-forward sublayer after it."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__(config)
        self.feed_forward = FeedForward(config)

    def forward(self, tower_ND: Tensor, cross_ND: Tensor, layout: Layout | None) -> Tensor:
        """Attend, then transform."""
        joined: Tensor = self.feed_forward(super().forward(tower_ND, cross_ND, layout))
        return joined


_FORMS: dict[str, Callable[[FusionConfig], Bridge]] = {
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


def build_bridge(config: FusionConfig) -> Bridge:
    """The bridge that ``config.bridge`` names."""
    return _FORMS[config.bridge](config)
