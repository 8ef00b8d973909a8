"""The heads of the pretraining objectives.

Shapes: B pairs, M masked tokens, D width, V vocabulary, C contrastive width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.schema import ModelConfig
from bridgetower.model.init import init_weights

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


class MLMHead(nn.Module):
    """Linear, GELU, LN, and a decoder of its own (not tied to the word embeddings, as published)."""

    def __init__(self, config: ModelConfig) -> None:
        """Build it."""
        super().__init__()
        width = config.fusion.width
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.fusion.layer_norm_eps)
        self.decoder = nn.Linear(width, config.text.vocabulary_size)
        init_weights(self)

    def forward(self, states_MD: Tensor) -> Tensor:
        """Logits of shape (M, V); give it the masked positions only."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.transform(states_MD))))
        return logits


class ITMHead(nn.Module):
    """Two classes on the pooled pair; class 1 is a match."""

    def __init__(self, config: ModelConfig) -> None:
        """Build it."""
        super().__init__()
        self.classifier = nn.Linear(2 * config.fusion.width, 2)
        init_weights(self)

    def forward(self, pooled_B2D: Tensor) -> Tensor:
        """Logits of shape (B, 2)."""
        logits: Tensor = self.classifier(pooled_B2D)
        return logits


class ITCHead(nn.Module):
    """Projections of the towers' class tokens, and the learned temperature."""

    def __init__(self, config: ModelConfig, width: int, initial_temperature: float) -> None:
        """Build it.

        Args:
            width: C.
        """
        super().__init__()
        self.text = nn.Linear(config.text.width, width)
        self.image = nn.Linear(config.vision.width, width)
        # One element, not a 0-dim tensor, which DeepSpeed 0.19.8 refuses.
        self.temperature = nn.Parameter(torch.full((1,), initial_temperature))
        init_weights(self)

    def embed_text(self, class_BD: Tensor) -> Tensor:
        """Unit vectors in float32, shape (B, C)."""
        return F.normalize(self.text(class_BD).float(), dim=-1)

    def embed_image(self, class_BD: Tensor) -> Tensor:
        """Unit vectors in float32, shape (B, C)."""
        return F.normalize(self.image(class_BD).float(), dim=-1)

    def clamped_temperature(self) -> Tensor:
        """The temperature within its bounds, in float32; its gradient passes the clamp, so that it can come back."""
        raw = self.temperature.float()
        return raw + (raw.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE) - raw).detach()
