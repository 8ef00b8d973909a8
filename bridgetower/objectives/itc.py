"""Image-text contrast: find the partner among all pairs of the micro-batches of all ranks.

Shapes: B pairs on this rank, G pairs of all ranks, D width, C contrastive width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower import dist
from bridgetower.config.schema import ModelConfig
from bridgetower.model.heads import ITCHead
from bridgetower.objectives.objective import Result, mean_metric


class ImageTextContrast(nn.Module):
    """Heads, temperature and loss. Source: ALBEF, arXiv 2107.07651, section 3.2, without queue and momentum."""

    def __init__(self, config: ModelConfig, width: int, initial_temperature: float) -> None:
        """Build the heads."""
        super().__init__()
        self.head = ITCHead(config, width, initial_temperature)

    def forward(self, text_class_BD: Tensor, image_class_BD: Tensor, image_id_B: Tensor) -> Result:
        """Cross-entropy in both directions.

        Pairs that show the same picture are all right answers, with equal shares: the identity targets of the
        published pretraining variant would push an image's other captions away from it.

        Args:
            text_class_BD: class tokens of the text tower's last layer.
            image_class_BD: those of the vision tower.
            image_id_B: equal for the same picture.
        """
        text_BC, image_BC = self.head.embed_text(text_class_BD), self.head.embed_image(image_class_BD)
        text_GC, image_GC = dist.gather_rows(text_BC), dist.gather_rows(image_BC)
        image_id_G = dist.gather_rows(image_id_B[:, None])[:, 0]
        temperature = self.head.clamped_temperature()
        target_BG = (image_id_B[:, None] == image_id_G[None, :]).float()
        target_BG = target_BG / target_BG.sum(dim=1, keepdim=True)
        image_logits_BG = image_BC @ text_GC.T / temperature
        text_logits_BG = text_BC @ image_GC.T / temperature
        loss = (F.cross_entropy(image_logits_BG, target_BG) + F.cross_entropy(text_logits_BG, target_BG)) / 2
        is_right_B = target_BG.gather(1, image_logits_BG.argmax(dim=1, keepdim=True)) > 0
        with torch.no_grad():
            metrics = {
                "loss/itc": mean_metric(loss, 1),
                "accuracy/itc": mean_metric(is_right_B.sum(), len(image_id_B)),
                "temperature": mean_metric(temperature.sum(), 1),
            }
        return Result(loss, metrics)
