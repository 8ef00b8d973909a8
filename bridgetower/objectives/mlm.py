"""Masked language modelling: predict hidden tokens from the rest of the caption and the image.

Shapes: B pairs, L tokens, M masked tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.schema import ModelConfig
from bridgetower.model.heads import MLMHead
from bridgetower.objectives.objective import Result, mean_metric


class MaskedLanguageModeling(nn.Module):
    """Head and loss. Source: arXiv 2206.08657, section 3.4."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the head."""
        super().__init__()
        self.head = MLMHead(config)

    def forward(self, text_BLD: Tensor, index_M: Tensor, label_M: Tensor, weight_M: Tensor) -> Result:
        """Score the masked positions only; at the others no logits are computed.

        Args:
            text_BLD: text states of the last cross-modal layer, from the masked captions.
            index_M: flat index b * L + l of each masked token; there may be none.
            label_M: its clean id.
            weight_M: weight of its loss; the weights of a micro-batch sum to 1.
        """
        logits_MV = self.logits(text_BLD, index_M)
        losses_M = F.cross_entropy(logits_MV, label_M, reduction="none")
        loss = (losses_M * weight_M).sum()
        is_right_M = logits_MV.argmax(dim=-1) == label_M
        return Result(
            loss,
            {
                "loss/mlm": mean_metric(loss, 1),
                "accuracy/mlm": mean_metric(is_right_M.sum(), len(label_M)),
            },
        )

    def logits(self, text_BLD: Tensor, index_M: Tensor) -> Tensor:
        """Logits at some positions, float32, shape (M, V)."""
        logits_MV: Tensor = self.head(text_BLD.flatten(0, 1)[index_M])
        return logits_MV.float()
