"""Masked language modelling: predict hidden tokens from the rest of the caption and the image.

Shapes: M masked tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bridgetower.batch import NO_TOKEN
from bridgetower.objectives.objective import Result, mean_metric


def masked_language_modeling(logits_MV: Tensor, label_M: Tensor, weight_M: Tensor) -> Result:
    """Return the weighted cross-entropy over the masked tokens, and the accuracy.

    Args:
        logits_MV: logits of the MLM head at the masked positions; M may be 0.
        label_M: clean id of each masked token; NO_TOKEN in padded slots.
        weight_M: weight of each token's loss; the weights of a micro-batch sum to 1.

    Source: arXiv 2206.08657, section 3.4.
    """
    logits_MV = logits_MV.float()
    losses_M = F.cross_entropy(logits_MV, label_M, reduction="none", ignore_index=NO_TOKEN)
    loss = (losses_M * weight_M).sum()
    is_right_M = logits_MV.argmax(dim=-1) == label_M
    return Result(
        loss,
        {"loss/mlm": mean_metric(loss, 1), "accuracy/mlm": mean_metric(is_right_M.sum(), (label_M != NO_TOKEN).sum())},
        {"loss/mlm": losses_M.detach(), "accuracy/mlm": is_right_M},
    )
