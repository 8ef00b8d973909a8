"""BridgeTower: two towers whose last layers are bridged to the layers of a cross-modal encoder.

Shapes: B pairs, L text tokens, P image positions, S image side in pixels, D width, K bridged layers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bridgetower.config.schema import ModelConfig
from bridgetower.model.cross_modal import CrossModalEncoder
from bridgetower.model.init import init_weights
from bridgetower.model.text_tower import TextTower
from bridgetower.model.vision_tower import VisionTower

# Of OpenAI's CLIP, which every published BridgeTower starts from.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@lru_cache
def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device. Not buffers of the model: those a bfloat16 engine would round."""
    return torch.tensor(PIXEL_MEAN, device=device).view(3, 1, 1), torch.tensor(PIXEL_STD, device=device).view(3, 1, 1)


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


class BridgeTower(nn.Module):
    """The model without heads. Source: arXiv 2206.08657, section 3."""

    def __init__(self, config: ModelConfig) -> None:
        """Build it with random weights; ``load_tower_weights`` brings pretrained towers."""
        super().__init__()
        self.config = config
        self.num_bridged = config.fusion.num_layers
        width = config.fusion.width
        self.vision_tower = VisionTower(config.vision, config.image_size_px)
        self.text_tower = TextTower(config.text)
        # One transform for all bridged layers of a tower, as published.
        self.text_transform = nn.Linear(config.text.width, width)
        self.image_transform = nn.Linear(config.vision.width, width)
        self.modality_embedding = nn.Embedding(2, width)  # row 0 text, row 1 image
        self.cross_modal = CrossModalEncoder(config.fusion)
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        for part in (
            self.text_transform,
            self.image_transform,
            self.modality_embedding,
            self.cross_modal,
            self.text_pooler,
            self.image_pooler,
        ):
            init_weights(part)

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        """From uint8 pixels to what ``encode_image`` reads, in the dtype of the weights."""
        mean, std = _pixel_statistics(pixels_B3SS.device)
        return ((pixels_B3SS.float() / 255.0 - mean) / std).to(self.text_transform.weight.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Encoded:
        """Run the vision tower.

        Args:
            pixels_B3SS: normalised, S = config.image_size_px.
        """
        states = self.vision_tower(pixels_B3SS, self.num_bridged)
        transformed_KBPD = self.image_transform(torch.stack(states)) + self.modality_embedding.weight[1]
        return Encoded(transformed_KBPD, states[-1][:, 0])

    def encode_text(self, ids_BL: Tensor, attention_mask_BL: Tensor) -> Encoded:
        """Run the text tower.

        Args:
            ids_BL: token ids, padded with RoBERTa's pad id 1.
            attention_mask_BL: bool, True for real tokens.
        """
        states = self.text_tower(ids_BL, attention_mask_BL, self.num_bridged)
        transformed_KBLD = self.text_transform(torch.stack(states)) + self.modality_embedding.weight[0]
        return Encoded(transformed_KBLD, states[-1][:, 0])

    def fuse(self, text_KBLD: Tensor, image_KBPD: Tensor, attention_mask_BL: Tensor) -> BridgeTowerOutput:
        """Run the cross-modal encoder on encoded texts and images; row b of both is one pair."""
        text_BLD, image_BPD = self.cross_modal(text_KBLD, image_KBPD, attention_mask_BL)
        pooled_B2D = torch.cat([self.text_pooler(text_BLD[:, 0]), self.image_pooler(image_BPD[:, 0])], dim=-1).tanh()
        return BridgeTowerOutput(text_BLD, image_BPD, pooled_B2D)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> BridgeTowerOutput:
        """Encode and fuse pairs.

        Args:
            pixel_values: normalised, shape (B, 3, S, S).
            input_ids: shape (B, L).
            attention_mask: shape (B, L), non-zero for real tokens.
        """
        mask_BL = attention_mask.bool()
        text, image = self.encode_text(input_ids, mask_BL), self.encode_image(pixel_values)
        return self.fuse(text.states_KBND, image.states_KBND, mask_BL)
