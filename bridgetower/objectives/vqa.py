"""Visual question answering as classification over a vocabulary of answers.

Shapes: B pairs of an image and a question, C answers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bridgetower.objectives.objective import Result, mean_metric


def question_answering(logits_BC: Tensor, target_BC: Tensor) -> Result:
    """Return the binary cross-entropy (sum over answers, mean over pairs) and the VQA score of the top answer.

    The published code writes the same loss as the mean over all elements, times the number of answers.

    Args:
        target_BC: soft score of each answer, 0 to 1.

    Source: microsoft/BridgeTower, src/modules/objectives.py (compute_vqa); arXiv 2206.08657, appendix A.
    """
    logits_BC = logits_BC.float()
    losses_B = F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none").sum(dim=1)
    loss = losses_B.mean()
    score_B = target_BC.gather(1, logits_BC.argmax(dim=1, keepdim=True))[:, 0]
    return Result(
        loss,
        {"loss/vqa": mean_metric(loss, 1), "score/vqa": mean_metric(score_B.sum(), len(score_B))},
        {"loss/vqa": losses_B.detach(), "score/vqa": score_B},
    )
