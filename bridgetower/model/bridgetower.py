"""BridgeTower: two towers whose last layers are bridged to the layers of a cross-modal encoder.

Shapes: B pairs, L text tokens, P image positions, S image side in pixels, D width, K bridged layers, V vocabulary; in a
step T tokens of all texts, N images, R rows (pairs of a text and an image), Q tokens that are read, I rows whose image
state is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.errors import ConfigError, DataError
from bridgetower.kernels.spans import takes_rooms
from bridgetower.model.absorption import absorbs_projections
from bridgetower.model.cross_modal import AttentionMaps, CrossModalEncoder, Wanted
from bridgetower.model.heads import HEADS, ITCHead, ITMHead, MLMHead, RankHead, build_head
from bridgetower.model.init import init_weights
from bridgetower.model.layer_gate import LayerGate
from bridgetower.model.packed import Layout, padded
from bridgetower.model.text_tower import TextTower, complete_text_config, longest_text
from bridgetower.model.vision_tower import VisionTower, complete_vision_config, is_clip_tower, pixel_statistics

TEXT_ROW, IMAGE_ROW = 0, 1  # of the modality embedding; with an NLVR2 head row 2 is of the second image


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Pixel statistics. Not buffers of the model: those a bfloat16 engine would round."""
    return torch.tensor(values, device=device).view(3, 1, 1)


class Encoded(NamedTuple):
    """What a tower gives for one batch of images (N = P) or captions (N = L)."""

    states_KBND: Tensor
    """Its bridged layers, transformed to the fusion width and marked with their modality."""
    class_BD: Tensor
    """The class token of its last layer as it leaves the tower, which ITC compares."""


class BridgeTowerOutput(NamedTuple):
    """What the cross-modal encoder gives for one batch of pairs."""

    text_states: Tensor
    """(B, L, D)."""
    image_states: Tensor
    """(B, P, D)."""
    pooled: Tensor
    """(B, 2 D), the pooled text class token first."""
    attention: AttentionMaps | None = None
    """The cross-attention of each layer, if it was asked for."""


def complete_model_config(config: ModelConfig) -> ModelConfig:
    """Fill in the sizes that the towers' names stand for, and check that all parts fit together.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    return dataclasses.replace(
        config, vision=complete_vision_config(config.vision), text=complete_text_config(config.text)
    )


class BridgeTower(nn.Module):
    """The model with the heads that are asked for. Source: arXiv 2206.08657, section 3."""

    def __init__(self, config: ModelConfig, heads: Sequence[str] = ()) -> None:
        """Build it with random weights; ``load_tower_weights`` brings pretrained towers.

        Args:
            heads: names from ``bridgetower.model.heads.HEADS``.

        Raises:
            ConfigError: a tower cannot be found or bridged, or the parts do not fit.
        """
        super().__init__()
        config = complete_model_config(config)
        self.config = config
        fusion = config.fusion
        self.vision_tower = VisionTower(config.vision, config.image_size_px)
        self.text_tower = TextTower(config.text)
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
            self.cross_modal = CrossModalEncoder(fusion)
            new += [self.text_transform, self.image_transform, self.modality_embedding, self.cross_modal]
        self.text_pooler = nn.Linear(fusion.width, fusion.width)
        self.image_pooler = nn.Linear(fusion.width, fusion.width)
        for part in [*new, self.text_pooler, self.image_pooler]:
            init_weights(part)
        self.heads = nn.ModuleDict()
        for name in heads:
            self.add_head(name)
        self.compute = ComputeConfig()

    @property
    def compute(self) -> ComputeConfig:
        """How work is saved; may be set anew at any time."""
        return self._compute

    @compute.setter
    def compute(self, compute: ComputeConfig) -> None:
        self._compute = compute
        for module in self.modules():
            if hasattr(module, "uses_kernels"):
                setattr(module, "uses_kernels", compute.fuse_kernels)  # noqa: B010 (a module has no such type)

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
        """From uint8 pixels to what ``encode_image`` reads, in the dtype of the weights."""
        mean, std = (_on_device(values, pixels_B3SS.device) for values in self.pixel_statistics)
        return ((pixels_B3SS.float() / 255.0 - mean) / std).to(self.text_pooler.weight.dtype)

    def encode_image(
        self, pixels_B3SS: Tensor, image_row: int = IMAGE_ROW, meanwhile: Callable[[], None] | None = None
    ) -> Encoded:
        """Run the vision tower.

        Args:
            pixels_B3SS: normalised, S = config.image_size_px.
            image_row: of the modality embedding; 2 for NLVR2's second image.
            meanwhile: called once, when the device has work for a while.

        Raises:
            DataError: another shape or type.
            ConfigError: there is no such row.
        """
        self._check_pixels(pixels_B3SS)
        if self.config.fusion.num_layers and not 0 <= image_row < self.modality_embedding.num_embeddings:
            raise ConfigError(
                f"image_row={image_row}, but the modality embedding has {self.modality_embedding.num_embeddings} rows. "
                "The row of a second image comes with an NLVR2 head: model.add_head('nlvr2')."
            )
        recompute = "vision" in self.compute.recompute
        num_states = self._num_states(self.config.vision.num_layers)
        states = self.vision_tower(pixels_B3SS, num_states, recompute=recompute, meanwhile=meanwhile)
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
        self._check_ids(ids_BL)
        if ids_BL.device.type == "cpu":  # elsewhere the host would wait for the device
            self._check_vocabulary(ids_BL)
        _check_mask(attention_mask_BL, ids_BL.shape)
        states = self.text_tower(
            ids_BL,
            attention_mask_BL.bool(),
            self._num_states(self.config.text.num_layers),
            recompute="text" in self.compute.recompute,
        )
        return Encoded(self._text_states(states), states[-1][:, 0])

    def encode_tokens(self, ids_T: Tensor, column_T: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Run the text tower on captions without padding.

        Args:
            ids_T: tokens of all captions.
            column_T: place of each in its caption.
            layout: where they stand.

        Returns: states as Encoded has them, (K, T, D), and those of the tower's last layer as they leave it, (T, D).
        """
        states = self.text_tower.packed(
            ids_T,
            column_T,
            layout,
            self._num_states(self.config.text.num_layers),
            recompute="text" in self.compute.recompute,
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
        """At the fusion width, marked with their modality: its row is added to the bias, not to every state."""
        return F.linear(states, transform.weight, transform.bias + self.modality_embedding.weight[row])

    def _num_states(self, num_layers: int) -> int:
        """Tower layers whose states are read: the bridged ones, all for METER's fusion, else the last."""
        fusion = self.config.fusion
        return num_layers if fusion.multi_layer_fusion else max(1, fusion.num_bridged)

    def fuse(
        self, text_KBLD: Tensor, image_KBPD: Tensor, attention_mask_BL: Tensor, *, return_attention: bool = False
    ) -> BridgeTowerOutput:
        """Run the cross-modal encoder on encoded texts and images; row b of both is one pair.

        Args:
            attention_mask_BL: True or non-zero for real tokens.
            return_attention: also give the cross-attention of each layer, for figures; slower.

        Raises:
            DataError: states of other layers than the bridged ones, of another width, type or number of pairs, or a
                mask of another shape or of floating-point numbers.
        """
        self._check_states(text_KBLD, image_KBPD)
        _check_mask(attention_mask_BL, text_KBLD.shape[1:3])
        mask_BL = attention_mask_BL.bool()
        maps = AttentionMaps([], []) if return_attention else None
        if self.config.fusion.num_layers:
            text_TD, image_BPD = self.cross_modal(
                text_KBLD.flatten(1, 2), image_KBPD, padded(mask_BL), self._fusion_compute, maps=maps
            )
            text_BLD = text_TD.unflatten(0, mask_BL.shape)
        else:
            text_BLD, image_BPD = text_KBLD[-1], image_KBPD[-1]
        return BridgeTowerOutput(text_BLD, image_BPD, self.pool(text_BLD[:, 0], image_BPD[:, 0]), maps)

    @property
    def step_compute(self) -> ComputeConfig:
        """The savings that change nothing in this model: texts are not packed where a bridge looks at padding."""
        packs = self.compute.pack_text and not self.config.fusion.sees_padding
        return dataclasses.replace(self.compute, pack_text=packs)

    @property
    def _fusion_compute(self) -> ComputeConfig:
        absorbs = self.compute.absorb_projections and absorbs_projections(self.config)
        return dataclasses.replace(self.compute, absorb_projections=absorbs)

    def takes_rooms(self, longest: int) -> bool:
        """Whether there may be empty places among packed texts: all attention is by kernels that leave them alone.

        Args:
            longest: tokens of a text.
        """
        config = self.config
        positions = self.image_grid_side**2 + 1
        words, states = self.text_tower.encoder.get_input_embeddings().weight, self.text_pooler.weight
        return (
            config.fusion.num_layers > 0
            and is_clip_tower(config.vision)
            and self.text_tower.has_kernels
            and takes_rooms(words, config.text.num_heads, longest, longest)
            and takes_rooms(states, config.fusion.num_heads, longest, longest)
            and takes_rooms(states, config.fusion.num_heads, longest, positions)
        )

    def fuse_rows(
        self, text_KTD: Tensor, layout: Layout, image_KNPD: Tensor, image_R: Tensor, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """Run the cross-modal encoder on encoded texts and images for what is read of its last layer.

        Args:
            text_KTD: of ``encode_tokens``.
            image_KNPD: of ``encode_image``.
            image_R: the image that each row's text is shown with.

        Returns: text states (Q, D) and image class states (I, D).
        """
        if self.config.fusion.num_layers:
            text_QD, image_I1D = self.cross_modal(
                text_KTD, image_KNPD, layout, self._fusion_compute, image_R=image_R, wanted=wanted
            )
            return text_QD, image_I1D[:, 0]
        return text_KTD[-1][wanted.token_Q], image_KNPD[-1][image_R[wanted.image_rows], 0]

    def pool(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """The pooled pair, shape (B, 2 D), of both streams' class states."""
        return torch.cat([self.text_pooler(text_BD), self.image_pooler(image_BD)], dim=-1).tanh()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, *, return_attention: bool = False
    ) -> BridgeTowerOutput:
        """Encode and fuse pairs.

        Args:
            pixel_values: normalised, shape (B, 3, S, S).
            input_ids: shape (B, L).
            attention_mask: shape (B, L), non-zero for real tokens.
            return_attention: also give the cross-attention of each layer.

        Raises:
            DataError: a shape, type or id that the model cannot read. On a GPU the look at the ids makes the host wait
                once; encode_text and fuse never do.
        """
        self._check_pixels(pixel_values)
        self._check_ids(input_ids)
        if len(pixel_values) != len(input_ids):
            raise DataError(
                f"There are {len(pixel_values)} images and {len(input_ids)} texts; row b of both is one pair. Repeat "
                "the images, or encode both apart (encode_image, encode_text) and fuse the rows that you want."
            )
        self._check_vocabulary(input_ids)
        text, image = self.encode_text(input_ids, attention_mask), self.encode_image(pixel_values)
        return self.fuse(text.states_KBND, image.states_KBND, attention_mask, return_attention=return_attention)

    def _check_pixels(self, pixels: Tensor) -> None:
        side, patch, dtype = self.config.image_size_px, self.config.vision.patch_size_px, self.text_pooler.weight.dtype
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or not len(pixels):
            given = tuple(pixels.shape)
            if len(given) != 4 or given[1] != 3 or not given[0]:
                cure = "Give one or more RGB images, channels before height and width."
            elif given[2] != given[3] or not given[3] or given[3] % patch:
                cure = f"Resize the images to {side} x {side} pixels."
            else:
                cure = f"Resize the images, or load the model with image_size_px={given[3]}."
            raise DataError(f"pixel_values have shape {given}, the model reads (pairs, 3, {side}, {side}). {cure}")
        if not pixels.is_floating_point():
            raise DataError(
                f"pixel_values are {pixels.dtype}, the model reads normalised floating-point pixels. "
                "Call model.normalize on uint8 ones."
            )
        if pixels.dtype != dtype and not torch.is_autocast_enabled(pixels.device.type):
            raise DataError(
                f"pixel_values are {pixels.dtype}, the weights are {dtype}. Use pixel_values.to({dtype}), or "
                "torch.autocast."
            )

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise DataError(
                f"input_ids have shape {tuple(ids.shape)} and type {ids.dtype}, the model reads whole numbers (int64) "
                "of shape (pairs, tokens). Give the tokenizer's ids, one row per text."
            )
        if ids.shape[1] > self._longest_text:
            raise DataError(
                f"input_ids have {ids.shape[1]} tokens, the text tower has positions for {self._longest_text}. "
                "Cut the texts to so many."
            )

    def _check_vocabulary(self, ids: Tensor) -> None:
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
        if lowest < 0 or highest >= self.config.text.vocabulary_size:
            raise DataError(
                f"input_ids hold {lowest if lowest < 0 else highest}, the vocabulary has ids from 0 to "
                f"{self.config.text.vocabulary_size - 1}. Use the tokenizer that the model was trained with "
                f"({self.config.text.tokenizer})."
            )

    def _check_states(self, text_KBLD: Tensor, image_KBPD: Tensor) -> None:
        fusion, (text, image) = self.config.fusion, (tuple(text_KBLD.shape), tuple(image_KBPD.shape))
        layers = max(1, fusion.num_bridged)
        for name, states in (("text", text_KBLD), ("image", image_KBPD)):
            found, dtype = tuple(states.shape), self.text_pooler.weight.dtype
            if len(found) != 4 or found[0] != layers or found[3] != fusion.width:
                raise DataError(
                    f"The {name} states have shape {found}, the cross-modal encoder reads ({layers}, pairs, positions, "
                    f"{fusion.width}). Give it states_KBND of encode_{name}."
                )
            if states.dtype != dtype and not torch.is_autocast_enabled(states.device.type):
                raise DataError(
                    f"The {name} states are {states.dtype}, the weights are {dtype}. Use states_KBND.to({dtype}), or "
                    "torch.autocast."
                )
        if text[1] != image[1]:
            raise DataError(
                f"There are states of {image[1]} images and {text[1]} texts; row b of both is one pair. Repeat or "
                "choose rows: states_KBND[:, rows]."
            )

    def word_logits(self, states_ND: Tensor) -> Tensor:
        """MLM's logits at some positions, shape (..., V). Needs the mlm head.

        Args:
            states_ND: text states of the last cross-modal layer; give the masked ones only where that is possible.
        """
        logits: Tensor = self.mlm_head(states_ND, self.text_tower.encoder.get_input_embeddings().weight)
        return logits

    def mlm_logits(self, output: BridgeTowerOutput) -> Tensor:
        """MLM's logits at every position, shape (B, L, V). Needs the mlm head."""
        return self.word_logits(output.text_states)

    def itm_logits(self, output: BridgeTowerOutput) -> Tensor:
        """ITM's logits, shape (B, 2); index 1 is a match. Needs the itm head."""
        logits: Tensor = self.itm_head(output.pooled)
        return logits


def _check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    if tuple(mask.shape) != tuple(shape):
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, the tokens {tuple(shape)}. Give one value per token: "
            "non-zero for real ones, 0 for padding."
        )
    if mask.is_floating_point():
        raise DataError(
            f"attention_mask is {mask.dtype}. Masks of that type are as often 0 for real tokens (those that are added "
            "to scores) as for padding. Give booleans or whole numbers, non-zero for real tokens: mask.bool() or "
            "mask == 0."
        )
