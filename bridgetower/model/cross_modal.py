"""The cross-modal encoder: two streams of post-norm transformer layers that attend to each other.

Shapes: R rows (pairs of a text and an image), T tokens of all texts, N images, P image positions, D width, H heads,
K bridged layers, Q tokens whose last state is read, I rows whose last image state is read.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridgetower.config.model import FusionConfig
from bridgetower.kernels.layout import Layout, SharedRows
from bridgetower.kernels.ops import Ops
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.bridge import BRIDGE_EPS, build_bridge


class AttentionMaps(NamedTuple):
    """Cross-attention of both streams, layer by layer, lowest first; the probabilities of each query sum to 1."""

    text_to_image: list[Tensor]
    """One tensor per layer, (R, H, L, P), with text tokens as queries."""
    image_to_text: list[Tensor]
    """One tensor per layer, (R, H, P, L)."""


class ReadStates(NamedTuple):
    """Which states of the last layer a loss reads; nothing else of that layer is computed."""

    token_Q: Tensor
    """int64; tokens whose text state is read."""
    token_layout: Layout
    """The row of each of these tokens."""
    image_rows: slice
    """Consecutive rows whose image state is read at position 0; there may be none."""
    tokens: slice
    """Tokens of those rows."""
    layout: Layout
    """Layout of those tokens."""


class CrossModalLayer(nn.Module):
    """One layer of one stream: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build it."""
        super().__init__()
        self.self_attention = Attention(config, ops)
        self.cross_attention = Attention(config, ops)
        self.feed_forward = FeedForward(config, ops)


class CrossModalEncoder(nn.Module):
    """Norms of the first layer, bridges of the others, and the layers of both streams.

    External layers stand after the bridged ones and have no bridge. If all are external (METER), the first has no norm.
    """

    def __init__(self, config: FusionConfig, ops: Ops, *, absorb: bool) -> None:
        """Build it.

        Args:
            absorb: texts attend to images without projecting the images, which is less work for short captions.
        """
        super().__init__()
        self.num_bridged, self.dropout, self.ops, self._absorb = config.num_bridged, config.dropout, ops, absorb
        if config.num_bridged:
            self.text_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
            self.image_norm = nn.LayerNorm(config.width, eps=BRIDGE_EPS)
        num_bridges = max(0, config.num_bridged - 1)
        self.text_bridges = nn.ModuleList(build_bridge(config, ops) for _ in range(num_bridges))
        self.image_bridges = nn.ModuleList(build_bridge(config, ops) for _ in range(num_bridges))
        self.text_layers = nn.ModuleList(CrossModalLayer(config, ops) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(CrossModalLayer(config, ops) for _ in range(config.num_layers))

    def forward(
        self,
        text_KTD: Tensor,
        image_KNPD: Tensor,
        layout: Layout,
        *,
        image_R: Tensor | None = None,
        read: ReadStates | None = None,
        maps: AttentionMaps | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the bridged layers of both towers.

        Args:
            text_KTD: transformed states of the text tower's bridged layers, lowest first; of its last layer if no layer
                is bridged.
            image_KNPD: transformed states of the vision tower's bridged layers.
            layout: where the tokens lie.
            image_R: the image that each row sees; None: row n sees image n.
            read: what is read of the last layer; None: everything.
            maps: where to add the cross-attention of each layer; None: nowhere.
            recompute: keep only what enters a layer, and compute the layer again for its gradient.

        Returns: text states (T, D) and image states (R, P, D) of the last layer; with ``read`` (Q, D) and (I, 1, D).
        Source: arXiv 2206.08657, section 3.3; in the published code the first layer has a plain norm and no bridge.
        """
        # Unbound, the layers' gradients are stacked once; indexing would make each a tensor of all layers.
        texts, images = text_KTD.unbind(), image_KNPD.unbind()
        text_TD, image_RPD = texts[0], images[0]
        if self.num_bridged:
            text_TD, image_RPD = (
                self.ops.norm(states, layer)[1]
                for states, layer in ((text_TD, self.text_norm), (image_RPD, self.image_norm))
            )
        shared = None if image_R is None else self.ops.share_rows(image_R, images[0])
        rows = shared  # MLM and ITM rows of an image share its state until a text has touched it: in the first layer
        last = len(self.text_layers) - 1
        for layer_index in range(last + 1):
            is_bridged = 0 < layer_index < self.num_bridged
            towers = (texts[layer_index], images[layer_index]) if is_bridged else None
            read_here = read if layer_index == last else None
            arguments = (layer_index, towers, text_TD, image_RPD, layout, shared, rows, read_here, maps)
            if recompute and torch.is_grad_enabled():
                text_TD, image_RPD = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                text_TD, image_RPD = self._layer(*arguments)
            rows = None
        return text_TD, image_RPD

    def _layer(
        self,
        layer_index: int,
        towers: tuple[Tensor, Tensor] | None,
        text_TD: Tensor,
        image_RPD: Tensor,
        layout: Layout,
        shared: SharedRows | None,
        rows: SharedRows | None,
        read: ReadStates | None,
        maps: AttentionMaps | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the bridges and one layer of both streams; each stream reads the other as it entered the layer."""
        if towers is not None:
            tower_TD, tower_RPD = towers
            if shared is not None:
                tower_RPD = self.ops.take_rows(tower_RPD, shared)
            text_TD = self.text_bridges[layer_index - 1](tower_TD, text_TD, layout)
            image_RPD = self.image_bridges[layer_index - 1](tower_RPD, image_RPD, None)
        if maps is not None:
            self._add_maps(maps, layer_index, text_TD, image_RPD, layout)
        return (
            self._text_layer(layer_index, text_TD, layout, image_RPD, rows, read),
            self._image_layer(layer_index, image_RPD, rows, text_TD, layout, read),
        )

    def _text_layer(
        self,
        layer_index: int,
        text_TD: Tensor,
        layout: Layout,
        image_RPD: Tensor,
        rows: SharedRows | None,
        read: ReadStates | None,
    ) -> Tensor:
        layer = cast(CrossModalLayer, self.text_layers[layer_index])
        states, query_layout = text_TD, layout
        if read is not None:
            states, query_layout = text_TD.index_select(0, read.token_Q), read.token_layout
        states = layer.self_attention(states, text_TD, query_layout, layout)
        states = layer.cross_attention.to_dense(states, image_RPD, query_layout, rows, absorb=self._absorb)
        result: Tensor = layer.feed_forward(states)
        return result

    def _image_layer(
        self,
        layer_index: int,
        image_RPD: Tensor,
        rows: SharedRows | None,
        text_TD: Tensor,
        layout: Layout,
        read: ReadStates | None,
    ) -> Tensor:
        """Run one layer of the image stream.

        Rows that see the same image share its self-attention, as no text has touched it yet; with dropout they share
        only its projections, as each row draws its own mask.
        """
        layer = cast(CrossModalLayer, self.image_layers[layer_index])
        if read is not None:
            if read.image_rows.start == read.image_rows.stop:
                return image_RPD[:0, :1]
            if rows is not None:
                image_RPD, rows = self.ops.take_rows(image_RPD, rows), None
            image_RPD, text_TD, layout = image_RPD[read.image_rows], text_TD[read.tokens], read.layout
            states = layer.self_attention(image_RPD[:, :1], image_RPD)
        elif rows is not None and self.training and self.dropout:
            states, rows = layer.self_attention(image_RPD, image_RPD, state_rows=rows, context_rows=rows), None
        else:
            states = layer.self_attention(image_RPD, image_RPD)
        states = layer.cross_attention(states, text_TD, None, layout, state_rows=rows)
        result: Tensor = layer.feed_forward(states)
        return result

    def _add_maps(
        self, maps: AttentionMaps, layer_index: int, text_TD: Tensor, image_RPD: Tensor, layout: Layout
    ) -> None:
        text_layer = cast(CrossModalLayer, self.text_layers[layer_index])
        image_layer = cast(CrossModalLayer, self.image_layers[layer_index])
        query_TD = text_layer.self_attention(text_TD, text_TD, layout, layout)
        query_RPD = image_layer.self_attention(image_RPD, image_RPD)
        maps.text_to_image.append(text_layer.cross_attention.probabilities(query_TD, image_RPD, layout, None))
        maps.image_to_text.append(image_layer.cross_attention.probabilities(query_RPD, text_TD, None, layout))
