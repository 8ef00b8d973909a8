"""Image-text contrast: find the partner of each image and text among the pairs of all ranks.

Shapes: B pairs on this rank, G pairs over all ranks, C contrastive width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower import dist
from bridgetower.objectives.objective import Result, mean_metric


def image_text_contrast(text_BC: Tensor, image_BC: Tensor, image_id_B: Tensor, temperature: Tensor) -> Result:
    """Return the mean cross-entropy of both directions.

    Every caption of an image is a positive, and the target spreads its probability evenly over them. The identity
    targets of the published pretraining variant would push an image's other captions away from it.

    Args:
        text_BC: unit vectors of the captions, float32.
        image_BC: unit vectors of their images, float32.
        image_id_B: equal for pairs that show the same image.
        temperature: shape (1,); divides the similarities.

    Source: ALBEF, arXiv 2107.07651, section 3.2, without queue and momentum encoder.
    """
    text_GC, image_GC = dist.gather_rows(text_BC), dist.gather_rows(image_BC)
    image_id_G = dist.gather_rows(image_id_B[:, None])[:, 0]
    target_BG = (image_id_B[:, None] == image_id_G[None, :]).float()
    target_BG = target_BG / target_BG.sum(dim=1, keepdim=True)
    image_logits_BG = image_BC @ text_GC.T / temperature
    text_logits_BG = text_BC @ image_GC.T / temperature
    image_losses_B = F.cross_entropy(image_logits_BG, target_BG, reduction="none")
    losses_B = (image_losses_B + F.cross_entropy(text_logits_BG, target_BG, reduction="none")) / 2
    loss = losses_B.mean()
    is_right_B = target_BG.gather(1, image_logits_BG.argmax(dim=1, keepdim=True))[:, 0] > 0
    with torch.no_grad():
        metrics = {
            "loss/itc": mean_metric(loss, 1),
            "accuracy/itc": mean_metric(is_right_B.sum(), len(image_id_B)),
            "temperature": mean_metric(temperature.sum(), 1),
        }
    return Result(loss, metrics, {"loss/itc": losses_B.detach(), "accuracy/itc": is_right_B})
