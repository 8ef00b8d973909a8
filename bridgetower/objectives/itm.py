"""Image-text matching: decide if a caption belongs to an image.

Shapes: B pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bridgetower.objectives.objective import Result, mean_metric


def image_text_matching(logits_B2: Tensor, label_B: Tensor) -> Result:
    """Return the cross-entropy over (no match, match), and the accuracy.

    Args:
        label_B: 1 for a true pair, 0 for a negative.

    Source: arXiv 2206.08657, section 3.4.
    """
    logits_B2 = logits_B2.float()
    losses_B = F.cross_entropy(logits_B2, label_B, reduction="none")
    loss = losses_B.mean()
    is_right_B = logits_B2.argmax(dim=-1) == label_B
    return Result(
        loss,
        {"loss/itm": mean_metric(loss, 1), "accuracy/itm": mean_metric(is_right_B.sum(), len(label_B))},
        {"loss/itm": losses_B.detach(), "accuracy/itm": is_right_B},
    )
