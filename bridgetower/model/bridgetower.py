"""BridgeTower: two towers whose last layers are bridged to the layers of a cross-modal encoder.

``bridgetower.model.plain`` has the same model in its plainest form; this one computes only what is read.

Shapes: B pairs, L text tokens, P image positions, S image side in pixels, D width, K bridged layers, V vocabulary; in a
packed step T tokens of all texts, N images, R rows (pairs of a text and an image), Q tokens that are read, I rows whose
image state is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.model import ModelConfig
from bridgetower.errors import ConfigError, DataError
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.layout import Layout, padded
from bridgetower.kernels.ops import Ops
from bridgetower.model.absorption import absorbs_projections
from bridgetower.model.cross_modal import AttentionMaps, CrossModalEncoder, ReadStates
from bridgetower.model.heads import HEADS, ITCHead, ITMHead, MLMHead, RankHead, build_head
from bridgetower.model.init import init_weights
from bridgetower.model.inputs import check_ids, check_mask, check_pixels, check_states, check_vocabulary
from bridgetower.model.layer_gate import LayerGate
from bridgetower.model.named_vits import is_clip_tower, pixel_statistics
from bridgetower.model.sizes import complete_model_config
from bridgetower.model.text_tower import TextTower, longest_text
from bridgetower.model.vision_tower import HalfEncoded, VisionTower

TEXT_ROW, IMAGE_ROW = 0, 1
"""Rows of the modality embedding; with an NLVR2 head row 2 is the second image's."""


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return pixel statistics, which are no buffers of the model: a bfloat16 engine would round those."""
    return torch.tensor(values, device=device).view(3, 1, 1)


class Encoded(NamedTuple):
    """What a tower returns for one batch of images (N = P) or captions (N = L)."""

    states_KBND: Tensor
    """The bridged layers, transformed to the fusion width and marked with their modality."""
    class_BD: Tensor
    """The class token of the tower's last layer, before it is transformed; ITC compares it."""


class BridgeTowerOutput(NamedTuple):
    """What the cross-modal encoder returns for one batch of pairs."""

    text_states: Tensor
    """Text states of the last layer, (B, L, D)."""
    image_states: Tensor
    """Image states of the last layer, (B, P, D)."""
    pooled: Tensor
    """The pooled pair, (B, 2 D), the text's half first."""
    attention: AttentionMaps | None = None
    """The cross-attention of each layer; None unless the caller wanted it."""


class BridgeTower(nn.Module):
    """The model with any of its heads. Source: arXiv 2206.08657, section 3."""

    def __init__(
        self,
        config: ModelConfig,
        heads: Sequence[str] = (),
        *,
        ops: Ops | None = None,
        recompute: Sequence[str] = (),
    ) -> None:
        """Build it with random weights; ``load_tower_weights`` brings pretrained towers.

        Args:
            heads: names from ``bridgetower.model.heads.HEADS``.
            ops: what computes the layers; None: ``choose_ops()``, the fastest operations of this machine.
            recompute: parts (vision, text, fusion) whose layers the backward pass computes again.

        Raises:
            ConfigError: a tower cannot be found or bridged, or the parts do not fit.
        """
        super().__init__()
        config = complete_model_config(config)
        self.config, self.recompute = config, tuple(recompute)
        self.ops = ops = ops or choose_ops()
        fusion = config.fusion
        self.vision_tower = VisionTower(config.vision, config.image_size_px, ops)
        self.text_tower = TextTower(config.text, ops)
        self.pixel_statistics = pixel_statistics(config.vision)
        """Mean and deviation of each channel, for pixels from 0 to 1, that the vision tower was trained with."""
        self._longest_text = longest_text(config.text)
        new: list[nn.Module] = []
        if fusion.multi_layer_fusion:
            self.text_gate = LayerGate(config.text.width)
            self.image_gate = LayerGate(config.vision.width)
            new += [self.text_gate, self.image_gate]
        if fusion.num_layers:
            # One transform for all bridged layers of a tower, as published.
            self.text_transform = nn.Linear(config.text.width, fusion.width)
            self.image_transform = nn.Linear(config.vision.width, fusion.width)
            self.modality_embedding = nn.Embedding(2, fusion.width)
            self.cross_modal = CrossModalEncoder(fusion, ops, absorb=absorbs_projections(config))
            new += [self.text_transform, self.image_transform, self.modality_embedding, self.cross_modal]
        self.text_pooler = nn.Linear(fusion.width, fusion.width)
        self.image_pooler = nn.Linear(fusion.width, fusion.width)
        for part in [*new, self.text_pooler, self.image_pooler]:
            init_weights(part)
        self.heads = nn.ModuleDict()
        for name in heads:
            self.add_head(name)

    def add_head(self, name: str) -> None:
        """Add a head with its initial weights, as fine-tuning does to a pretrained model.

        An NLVR2 head also gives the second image a row of its own in the modality embedding, a copy of the first's.
        A rank head starts as the match row of the ITM head, if there is one.

        Args:
            name: one of ``bridgetower.model.heads.HEADS``.

        Raises:
            ConfigError: there is no such head.
        """
        if name not in HEADS:
            raise ConfigError(f"There is no head {name!r}. Use one of {', '.join(HEADS)}.")
        device, dtype = self.text_pooler.weight.device, self.text_pooler.weight.dtype
        with device:
            self.heads[name] = build_head(name, self.config).to(dtype).train(self.training)
        with torch.no_grad():
            if name == "nlvr2" and self.config.fusion.num_layers:
                rows = self.modality_embedding.weight
                grown = nn.Embedding(3, rows.shape[1], device=device, dtype=dtype)
                grown.weight.copy_(torch.cat([rows[:2], rows[IMAGE_ROW : IMAGE_ROW + 1]]))
                self.modality_embedding = grown.train(self.training)
            if name == "rank" and "itm" in self.heads:
                match = self.itm_head.classifier
                rank = cast(RankHead, self.heads["rank"]).classifier
                rank.weight.copy_(match.weight[1:])
                rank.bias.copy_(match.bias[1:])

    @property
    def image_grid_side(self) -> int:
        """Patches per side of an image."""
        return self.config.image_size_px // self.config.vision.patch_size_px

    @property
    def mlm_head(self) -> MLMHead:
        """The head of masked language modelling."""
        return cast(MLMHead, self._head("mlm"))

    @property
    def itm_head(self) -> ITMHead:
        """The head of image-text matching."""
        return cast(ITMHead, self._head("itm"))

    @property
    def itc_head(self) -> ITCHead:
        """The head of image-text contrast."""
        return cast(ITCHead, self._head("itc"))

    def _head(self, name: str) -> nn.Module:
        if name not in self.heads:
            raise ConfigError(
                f"This model has no {name} head; it has {', '.join(self.heads) or 'none'}. Load a checkpoint with one, "
                f"or add one with random weights: model.add_head({name!r})."
            )
        return self.heads[name]

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        """Return what ``encode_image`` reads, in the dtype of the weights, from uint8 pixels."""
        mean, std = (_on_device(values, pixels_B3SS.device) for values in self.pixel_statistics)
        return ((pixels_B3SS.float() / 255.0 - mean) / std).to(self.text_pooler.weight.dtype)

    def encode_image(self, pixels_B3SS: Tensor, image_row: int = IMAGE_ROW) -> Encoded:
        """Run the vision tower.

        Args:
            pixels_B3SS: normalised, S = config.image_size_px.
            image_row: row of the modality embedding; 2 for NLVR2's second image.

        Raises:
            DataError: another shape or type.
            ConfigError: there is no such row.
        """
        return self.finish_image(self.begin_image(pixels_B3SS), image_row)

    def begin_image(self, pixels_B3SS: Tensor) -> HalfEncoded:
        """Run the first third of the vision tower, so that a GPU has work while the host launches something else.

        Raises:
            DataError: pixels of another shape or type.
        """
        check_pixels(pixels_B3SS, self.config, self.text_pooler.weight.dtype)
        num_states = self._num_states(self.config.vision.num_layers)
        return self.vision_tower.begin(pixels_B3SS, num_states, recompute="vision" in self.recompute)

    def finish_image(self, stream: HalfEncoded, image_row: int = IMAGE_ROW) -> Encoded:
        """Run the rest of the vision tower, and transform its bridged layers.

        Raises:
            ConfigError: the modality embedding has no such row.
        """
        if self.config.fusion.num_layers and not 0 <= image_row < self.modality_embedding.num_embeddings:
            raise ConfigError(
                f"image_row={image_row}, but the modality embedding has {self.modality_embedding.num_embeddings} rows. "
                "The row of a second image comes with an NLVR2 head: model.add_head('nlvr2')."
            )
        states = self.vision_tower.finish(stream)
        class_BD = states[-1][:, 0]
        if self.config.fusion.multi_layer_fusion:
            states = [self.image_gate(states)]
        states_KBPD = torch.stack(states)
        if self.config.fusion.num_layers:
            states_KBPD = self._transformed(self.image_transform, states_KBPD, image_row)
        return Encoded(states_KBPD, class_BD)

    def encode_text(self, ids_BL: Tensor, attention_mask_BL: Tensor) -> Encoded:
        """Run the text tower.

        Args:
            ids_BL: token ids, padded with the text tower's pad id (RoBERTa: 1).
            attention_mask_BL: True or non-zero for real tokens.

        Raises:
            DataError: another shape or type, more tokens than the text tower has positions, or (on a CPU) an id that
                the vocabulary lacks.
        """
        check_ids(ids_BL, self._longest_text)
        if ids_BL.device.type == "cpu":  # elsewhere the host would wait for the device
            check_vocabulary(ids_BL, self.config.text)
        check_mask(attention_mask_BL, ids_BL.shape)
        states = self.text_tower(
            ids_BL,
            attention_mask_BL.bool(),
            self._num_states(self.config.text.num_layers),
            recompute="text" in self.recompute,
        )
        return Encoded(self._text_states(states), states[-1][:, 0])

    def encode_tokens(self, ids_T: Tensor, column_T: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Run the text tower on captions without padding.

        Args:
            ids_T: tokens of all captions.
            column_T: position of each token in its caption, from 0.
            layout: where the captions lie.

        Returns: states of the bridged layers, transformed as in ``Encoded``, (K, T, D), and the states of the tower's
            last layer before they are transformed, (T, D).
        """
        states = self.text_tower.packed(
            ids_T,
            column_T,
            layout,
            self._num_states(self.config.text.num_layers),
            recompute="text" in self.recompute,
        )
        return self._text_states(states), states[-1]

    def _text_states(self, states: list[Tensor]) -> Tensor:
        if self.config.fusion.multi_layer_fusion:
            states = [self.text_gate(states)]
        stacked = torch.stack(states)
        if self.config.fusion.num_layers:
            stacked = self._transformed(self.text_transform, stacked, TEXT_ROW)
        return stacked

    def _transformed(self, transform: nn.Linear, states: Tensor, row: int) -> Tensor:
        """Return states at the fusion width, marked with their modality, whose row is added to the bias alone."""
        return F.linear(states, transform.weight, transform.bias + self.modality_embedding.weight[row])

    def _num_states(self, num_layers: int) -> int:
        """Return how many tower layers are read: the bridged ones, all for METER's fusion, else the last."""
        fusion = self.config.fusion
        return num_layers if fusion.multi_layer_fusion else max(1, fusion.num_bridged)

    def fuse(
        self, text_KBLD: Tensor, image_KBPD: Tensor, attention_mask_BL: Tensor, *, return_attention: bool = False
    ) -> BridgeTowerOutput:
        """Run the cross-modal encoder on encoded texts and images; row b of both is one pair.

        Args:
            attention_mask_BL: True or non-zero for real tokens.
            return_attention: return the cross-attention of each layer, too, for figures; slower.

        Raises:
            DataError: states of other layers than the bridged ones, of another width, type or number of pairs, or a
                mask of another shape or of floating-point numbers.
        """
        check_states(text_KBLD, image_KBPD, self.config.fusion, self.text_pooler.weight.dtype)
        check_mask(attention_mask_BL, text_KBLD.shape[1:3])
        mask_BL = attention_mask_BL.bool()
        maps = AttentionMaps([], []) if return_attention else None
        if self.config.fusion.num_layers:
            text_TD, image_BPD = self.cross_modal(
                text_KBLD.flatten(1, 2), image_KBPD, padded(mask_BL), maps=maps, recompute="fusion" in self.recompute
            )
            text_BLD = text_TD.unflatten(0, mask_BL.shape)
        else:
            text_BLD, image_BPD = text_KBLD[-1], image_KBPD[-1]
        return BridgeTowerOutput(text_BLD, image_BPD, self.pool(text_BLD[:, 0], image_BPD[:, 0]), maps)

    def supports_buckets(self, longest: int) -> bool:
        """Return True if packed texts may be filled up with tokens of no caption: all attention skips those.

        Args:
            longest: tokens of the longest text.
        """
        config = self.config
        positions = self.image_grid_side**2 + 1
        words, states = self.text_tower.encoder.get_input_embeddings().weight, self.text_pooler.weight
        return (
            config.fusion.num_layers > 0
            and is_clip_tower(config.vision)
            and self.ops.supports_buckets(words, config.text.num_heads, longest, longest)
            and self.ops.supports_buckets(states, config.fusion.num_heads, longest, longest)
            and self.ops.supports_buckets(states, config.fusion.num_heads, longest, positions)
        )

    def fuse_rows(
        self, text_KTD: Tensor, layout: Layout, image_KNPD: Tensor, image_R: Tensor, read: ReadStates
    ) -> tuple[Tensor, Tensor]:
        """Run the cross-modal encoder on encoded texts and images for what is read of its last layer.

        Args:
            text_KTD: states that ``encode_tokens`` returned.
            layout: where the texts lie.
            image_KNPD: states that ``encode_image`` returned.
            image_R: the image that each row's text is shown with.
            read: what is read.

        Returns: text states (Q, D) and image class states (I, D).
        """
        if self.config.fusion.num_layers:
            recompute = "fusion" in self.recompute
            text_QD, image_I1D = self.cross_modal(
                text_KTD, image_KNPD, layout, image_R=image_R, read=read, recompute=recompute
            )
            return text_QD, image_I1D[:, 0]
        return text_KTD[-1][read.token_Q], image_KNPD[-1][image_R[read.image_rows], 0]

    def pool(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """Return the pooled pair, shape (B, 2 D), of both streams' class states."""
        return torch.cat([self.text_pooler(text_BD), self.image_pooler(image_BD)], dim=-1).tanh()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, *, return_attention: bool = False
    ) -> BridgeTowerOutput:
        """Encode and fuse pairs.

        Args:
            pixel_values: normalised, shape (B, 3, S, S).
            input_ids: shape (B, L).
            attention_mask: shape (B, L), non-zero for real tokens.
            return_attention: return the cross-attention of each layer, too.

        Raises:
            DataError: a shape, type or id that the model cannot read. On a GPU checking the ids makes the host wait
                once; encode_text and fuse never do.
        """
        check_pixels(pixel_values, self.config, self.text_pooler.weight.dtype)
        check_ids(input_ids, self._longest_text)
        if len(pixel_values) != len(input_ids):
            raise DataError(
                f"There are {len(pixel_values)} images and {len(input_ids)} texts; row b of both is one pair. Repeat "
                "the images, or encode both apart (encode_image, encode_text) and fuse the rows that you choose."
            )
        check_vocabulary(input_ids, self.config.text)
        text, image = self.encode_text(input_ids, attention_mask), self.encode_image(pixel_values)
        return self.fuse(text.states_KBND, image.states_KBND, attention_mask, return_attention=return_attention)

    def word_logits(self, states_ND: Tensor) -> Tensor:
        """Return MLM's logits at some positions, shape (..., V). Needs the mlm head.

        Args:
            states_ND: text states of the last cross-modal layer; those of masked tokens suffice for a loss.
        """
        logits: Tensor = self.mlm_head(states_ND, self.text_tower.encoder.get_input_embeddings().weight)
        return logits

    def mlm_logits(self, output: BridgeTowerOutput) -> Tensor:
        """Return MLM's logits at every position, shape (B, L, V). Needs the mlm head."""
        return self.word_logits(output.text_states)

    def itm_logits(self, output: BridgeTowerOutput) -> Tensor:
        """Return ITM's logits, shape (B, 2); index 1 is a match. Needs the itm head."""
        logits: Tensor = self.itm_head(output.pooled)
        return logits
