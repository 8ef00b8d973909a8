"""The cross-modal encoder: two streams of post-norm transformer layers that attend to each other.

Shapes: B pairs, L text tokens, P image positions, D width, H heads, K bridged layers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from bridgetower.config.schema import FusionConfig
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.bridge import BRIDGE_EPS, build_bridge


class AttentionMaps(NamedTuple):
    """How the two streams look at each other, layer by layer, lowest first; rows sum to 1."""

    text_to_image: list[Tensor]
    """Each (B, H, L, P), text tokens as queries."""
    image_to_text: list[Tensor]
    """Each (B, H, P, L)."""


class CrossModalLayer(nn.Module):
    """One layer of one stream: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        own_BND: Tensor,
        own_mask: Tensor | None,
        other_BND: Tensor,
        other_mask: Tensor | None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Update one stream. The other is read as it entered the layer, not after its own self-attention.

        Args:
            maps: where to put how the stream looks at the other, if that is wanted.
        """
        states = self.self_attention(own_BND, own_BND, own_mask)
        if maps is not None:
            maps.append(self.cross_attention.shares(states, other_BND, other_mask))
        states = self.cross_attention(states, other_BND, other_mask)
        result: Tensor = self.feed_forward(states)
        return result


class CrossModalEncoder(nn.Module):
    """Norms of the first layer, bridges of the others, and the layers of both streams.

    External layers stand after the bridged ones and have no bridge. If all are external (METER), the first has no norm.
    """

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.num_bridged = config.num_bridged
        if config.num_bridged:
            self.text_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
            self.image_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
        num_bridges = max(0, config.num_bridged - 1)
        self.text_bridges = nn.ModuleList(build_bridge(config) for _ in range(num_bridges))
        self.image_bridges = nn.ModuleList(build_bridge(config) for _ in range(num_bridges))
        self.text_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))

    def forward(
        self, text_KBLD: Tensor, image_KBPD: Tensor, text_mask_BL: Tensor, maps: AttentionMaps | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fuse the bridged layers of both towers.

        Args:
            text_KBLD: transformed states of the text tower's bridged layers, lowest first; of its last one if no layer
                is bridged.
            image_KBPD: those of the vision tower.
            text_mask_BL: True for real tokens.
            maps: where to put the cross-attention of each layer, if that is wanted.

        Returns: text states (B, L, D) and image states (B, P, D) of the last layer.
        Source: arXiv 2206.08657, section 3.3; in the published code the first layer has a plain norm and no bridge.
        """
        text_BLD, image_BPD = text_KBLD[0], image_KBPD[0]
        if self.num_bridged:
            text_BLD, image_BPD = self.text_norm(text_BLD), self.image_norm(image_BPD)
        for number, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if 0 < number < self.num_bridged:
                text_BLD = self.text_bridges[number - 1](text_KBLD[number], text_BLD, text_mask_BL)
                image_BPD = self.image_bridges[number - 1](image_KBPD[number], image_BPD, None)
            text_BLD, image_BPD = (
                text_layer(text_BLD, text_mask_BL, image_BPD, None, maps and maps.text_to_image),
                image_layer(image_BPD, None, text_BLD, text_mask_BL, maps and maps.image_to_text),
            )
        return text_BLD, image_BPD
