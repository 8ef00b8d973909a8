"""The cross-modal encoder: two streams of post-norm transformer layers that attend to each other.

Shapes: R rows (pairs of a text and an image), T tokens of all texts, N images, P image positions, D width, H heads,
K bridged layers, Q tokens whose last state is read, I rows whose last image state is read.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import FusionConfig
from bridgetower.kernels.ops import Shared, norm, share
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.bridge import BRIDGE_EPS, build_bridge
from bridgetower.model.packed import Layout


class AttentionMaps(NamedTuple):
    """How the two streams look at each other, layer by layer, lowest first; rows sum to 1."""

    text_to_image: list[Tensor]
    """Each (R, H, L, P), text tokens as queries."""
    image_to_text: list[Tensor]
    """Each (R, H, P, L)."""


class Wanted(NamedTuple):
    """What is read of the last layer's states; nothing else of it is computed."""

    token_Q: Tensor
    """int64; tokens whose text state is read."""
    token_layout: Layout
    """Which row each of them belongs to."""
    image_rows: slice
    """Consecutive rows whose image state is read, at position 0; there may be none."""
    tokens: slice
    """Tokens of those rows."""
    layout: Layout
    """Their layout."""


class CrossModalLayer(nn.Module):
    """One layer of one stream: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)


class CrossModalEncoder(nn.Module):
    """Norms of the first layer, bridges of the others, and the layers of both streams.

    External layers stand after the bridged ones and have no bridge. If all are external (METER), the first has no norm.
    """

    uses_kernels = True

    def __init__(self, config: FusionConfig) -> None:
        """Build it."""
        super().__init__()
        self.num_bridged, self.dropout = config.num_bridged, config.dropout
        if config.num_bridged:
            self.text_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
            self.image_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
        num_bridges = max(0, config.num_bridged - 1)
        self.text_bridges = nn.ModuleList(build_bridge(config) for _ in range(num_bridges))
        self.image_bridges = nn.ModuleList(build_bridge(config) for _ in range(num_bridges))
        self.text_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))

    def forward(
        self,
        text_KTD: Tensor,
        image_KNPD: Tensor,
        layout: Layout,
        compute: ComputeConfig,
        *,
        image_R: Tensor | None = None,
        wanted: Wanted | None = None,
        maps: AttentionMaps | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the bridged layers of both towers.

        Args:
            text_KTD: transformed states of the text tower's bridged layers, lowest first; of its last one if no layer
                is bridged.
            image_KNPD: those of the vision tower.
            layout: where the tokens stand.
            compute: which work is saved; the results are the same.
            image_R: the image that each row sees; None: row n sees image n.
            wanted: what is read of the result; None: everything.
            maps: where to put the cross-attention of each layer, if that is wanted.

        Returns: text states (T, D) and image states (R, P, D) of the last layer; or (Q, D) and (I, 1, D).
        Source: arXiv 2206.08657, section 3.3; in the published code the first layer has a plain norm and no bridge.
        """
        # Unbound, their gradients are stacked once; of each index taken it would be a tensor of all layers.
        texts, images = text_KTD.unbind(), image_KNPD.unbind()
        text_TD, image_RPD = texts[0], images[0]
        if self.num_bridged:
            text_TD, image_RPD = (
                norm(states, layer, kernels=self.uses_kernels)[1]
                for states, layer in ((text_TD, self.text_norm), (image_RPD, self.image_norm))
            )
        shared = None if image_R is None else share(image_R, images[0], kernels=self.uses_kernels)
        rows = shared  # of image_RPD; None once each row has its own state
        if rows is not None and not compute.share_first_layer:
            image_RPD, rows = rows.take(image_RPD), None
        recompute = "fusion" in compute.recompute and torch.is_grad_enabled()
        last = len(self.text_layers) - 1
        for number in range(last + 1):
            is_bridged = 0 < number < self.num_bridged
            towers = (texts[number], images[number]) if is_bridged else None
            read = wanted if number == last and compute.prune_last_layer else None
            arguments = (number, towers, text_TD, image_RPD, layout, shared, rows, read, compute, maps)
            # Recomputing keeps only what enters a layer, and computes it again for its gradient.
            text_TD, image_RPD = (
                checkpoint(self._layer, *arguments, use_reentrant=False) if recompute else self._layer(*arguments)
            )
            rows = None
        if wanted is not None and not compute.prune_last_layer:
            return text_TD.index_select(0, wanted.token_Q), image_RPD[wanted.image_rows, :1]
        return text_TD, image_RPD

    def _layer(
        self,
        number: int,
        towers: tuple[Tensor, Tensor] | None,
        text_TD: Tensor,
        image_RPD: Tensor,
        layout: Layout,
        shared: Shared | None,
        rows: Shared | None,
        wanted: Wanted | None,
        compute: ComputeConfig,
        maps: AttentionMaps | None,
    ) -> tuple[Tensor, Tensor]:
        """Bridges, and one layer of both streams; each reads the other as it entered the layer."""
        if towers is not None:
            tower_TD, tower_RPD = towers
            if shared is not None:
                tower_RPD = shared.take(tower_RPD)
            text_TD = self.text_bridges[number - 1](tower_TD, text_TD, layout)
            image_RPD = self.image_bridges[number - 1](tower_RPD, image_RPD, None)
        if maps is not None:
            self._note_maps(maps, number, text_TD, image_RPD, layout)
        return (
            self._text_layer(number, text_TD, layout, image_RPD, rows, wanted, compute.absorb_projections),
            self._image_layer(number, image_RPD, rows, text_TD, layout, wanted),
        )

    def _text_layer(
        self,
        number: int,
        text_TD: Tensor,
        layout: Layout,
        image_RPD: Tensor,
        rows: Shared | None,
        wanted: Wanted | None,
        absorb: bool,
    ) -> Tensor:
        layer = cast(CrossModalLayer, self.text_layers[number])
        states, own = text_TD, layout
        if wanted is not None:
            states, own = text_TD.index_select(0, wanted.token_Q), wanted.token_layout
        states = layer.self_attention(states, text_TD, own, layout)
        states = layer.cross_attention(states, image_RPD, own, context_rows=rows, absorb=absorb)
        result: Tensor = layer.feed_forward(states)
        return result

    def _image_layer(
        self,
        number: int,
        image_RPD: Tensor,
        rows: Shared | None,
        text_TD: Tensor,
        layout: Layout,
        wanted: Wanted | None,
    ) -> Tensor:
        """Rows that see the same image share what no text has touched yet, but each has its own dropout."""
        layer = cast(CrossModalLayer, self.image_layers[number])
        if wanted is not None:
            if wanted.image_rows.start == wanted.image_rows.stop:
                return image_RPD[:0, :1]
            if rows is not None:
                image_RPD, rows = rows.take(image_RPD), None
            image_RPD, text_TD, layout = image_RPD[wanted.image_rows], text_TD[wanted.tokens], wanted.layout
            states = layer.self_attention(image_RPD[:, :1], image_RPD)
        elif rows is not None and self.training and self.dropout:
            states, rows = layer.self_attention(image_RPD, image_RPD, state_rows=rows, context_rows=rows), None
        else:
            states = layer.self_attention(image_RPD, image_RPD)
        states = layer.cross_attention(states, text_TD, None, layout, state_rows=rows)
        result: Tensor = layer.feed_forward(states)
        return result

    def _note_maps(self, maps: AttentionMaps, number: int, text_TD: Tensor, image_RPD: Tensor, layout: Layout) -> None:
        text_layer = cast(CrossModalLayer, self.text_layers[number])
        image_layer = cast(CrossModalLayer, self.image_layers[number])
        own_TD = text_layer.self_attention(text_TD, text_TD, layout, layout)
        own_RPD = image_layer.self_attention(image_RPD, image_RPD)
        maps.text_to_image.append(text_layer.cross_attention.shares(own_TD, image_RPD, layout, None))
        maps.image_to_text.append(image_layer.cross_attention.shares(own_RPD, text_TD, None, layout))
