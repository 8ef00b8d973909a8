"""Image-text matching: whether a caption belongs to an image.

Shapes: B pairs, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.schema import ModelConfig
from bridgetower.model.heads import ITMHead
from bridgetower.objectives.objective import Result, mean_metric


class ImageTextMatching(nn.Module):
    """Head and loss. Source: arXiv 2206.08657, section 3.4."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the head."""
        super().__init__()
        self.head = ITMHead(config)

    def forward(self, pooled_B2D: Tensor, label_B: Tensor) -> Result:
        """Cross-entropy over match and no match.

        Args:
            label_B: 1 where the pair is a true one.
        """
        logits_B2 = self.head(pooled_B2D).float()
        loss = F.cross_entropy(logits_B2, label_B)
        is_right_B = logits_B2.argmax(dim=-1) == label_B
        return Result(
            loss,
            {"loss/itm": mean_metric(loss, 1), "accuracy/itm": mean_metric(is_right_B.sum(), len(label_B))},
        )

    def log_odds(self, pooled_B2D: Tensor) -> Tensor:
        """How much likelier a match is than none, as a logit; float32, shape (B,)."""
        logits_B2 = self.head(pooled_B2D).float()
        log_odds_B: Tensor = logits_B2[:, 1] - logits_B2[:, 0]
        return log_odds_B
