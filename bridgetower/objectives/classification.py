"""Classification with one right class: SNLI-VE (contradiction, neutral, entailment) and NLVR2 (false, true).

Shapes: B pairs, C classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bridgetower.objectives.objective import Result, mean_metric


def classification(name: str, logits_BC: Tensor, target_BC: Tensor) -> Result:
    """Return the cross-entropy and the accuracy.

    Args:
        name: name of the task, for its metrics.
        target_BC: 1 for the right class, else 0.

    Source: arXiv 2206.08657, section 4.3.
    """
    logits_BC = logits_BC.float()
    label_B = target_BC.argmax(dim=1)
    losses_B = F.cross_entropy(logits_BC, label_B, reduction="none")
    loss = losses_B.mean()
    is_right_B = logits_BC.argmax(dim=1) == label_B
    return Result(
        loss,
        {
            f"loss/{name}": mean_metric(loss, 1),
            f"accuracy/{name}": mean_metric(is_right_B.sum(), len(is_right_B)),
        },
        {f"loss/{name}": losses_B.detach(), f"accuracy/{name}": is_right_B},
    )
