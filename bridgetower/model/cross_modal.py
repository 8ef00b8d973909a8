"""The cross-modal encoder: two streams of post-norm transformer layers that attend to each other.

Shapes: B pairs, Q queries, N positions attended to, L text tokens, P image positions, D width, H heads, K layers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.schema import FusionConfig
from bridgetower.model.bridge import BRIDGE_EPS, AddNormBridge


class Attention(nn.Module):
    """Multi-head attention with its residual and post-norm: LN(x + Dropout(W_o attention(x, context)))."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it for self-attention or cross-attention; the two differ only in their context."""
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states_BQD: Tensor, context_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Attend from the states to the context.

        Args:
            mask_BN: True where the context may be attended to; None where all of it may.

        Returns: shape (B, Q, D).
        """
        attended_BHQD = F.scaled_dot_product_attention(
            self._split(self.query(states_BQD)),
            self._split(self.key(context_BND)),
            self._split(self.value(context_BND)),
            attn_mask=None if mask_BN is None else mask_BN[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended_BQD = attended_BHQD.transpose(1, 2).flatten(2)
        update_BQD = F.dropout(self.output(attended_BQD), self.dropout, self.training)
        result: Tensor = self.norm(states_BQD + update_BQD)
        return result

    def _split(self, states_BND: Tensor) -> Tensor:
        batch, positions, width = states_BND.shape
        return states_BND.view(batch, positions, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """LN(x + Dropout(W_2 GELU(W_1 x)))."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it with four times the width inside."""
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states_BND: Tensor) -> Tensor:
        """Shape (B, N, D) to (B, N, D)."""
        update_BND = self.contract(F.gelu(self.expand(states_BND)))
        result: Tensor = self.norm(states_BND + F.dropout(update_BND, self.dropout, self.training))
        return result


class CrossModalLayer(nn.Module):
    """One layer of one stream: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, own_BND: Tensor, own_mask: Tensor | None, other_BND: Tensor, other_mask: Tensor | None) -> Tensor:
        """Update one stream. The other is read as it entered the layer, not after its own self-attention."""
        states = self.self_attention(own_BND, own_BND, own_mask)
        states = self.cross_attention(states, other_BND, other_mask)
        result: Tensor = self.feed_forward(states)
        return result


class CrossModalEncoder(nn.Module):
    """Norms of the first layer, bridges of the others, and the layers of both streams."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        num_bridges = config.num_layers - 1
        self.text_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
        self.image_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
        self.text_bridges = nn.ModuleList(AddNormBridge(config.width) for _ in range(num_bridges))
        self.image_bridges = nn.ModuleList(AddNormBridge(config.width) for _ in range(num_bridges))
        self.text_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))

    def forward(self, text_KBLD: Tensor, image_KBPD: Tensor, text_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the bridged layers of both towers.

        Args:
            text_KBLD: transformed states of the text tower's bridged layers, lowest first.
            image_KBPD: those of the vision tower.
            text_mask_BL: True for real tokens.

        Returns: text states (B, L, D) and image states (B, P, D) of the last layer.
        Source: arXiv 2206.08657, section 3.3; in the published code the first layer has a plain norm and no bridge.
        """
        text_BLD, image_BPD = self.text_norm(text_KBLD[0]), self.image_norm(image_KBPD[0])
        for number, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if number:
                text_BLD = self.text_bridges[number - 1](text_KBLD[number], text_BLD)
                image_BPD = self.image_bridges[number - 1](image_KBPD[number], image_BPD)
            text_BLD, image_BPD = (
                text_layer(text_BLD, text_mask_BL, image_BPD, None),
                image_layer(image_BPD, None, text_BLD, text_mask_BL),
            )
        return text_BLD, image_BPD
