"""Image-text matching: two classes, of which class 1 is a match."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bridgetower.model.heads import ITMHead
from bridgetower.objectives.itm import image_text_matching
from tests.small_models import shake, small_config


class Matching(nn.Module):
    """The ITM head, and the loss of its logits."""

    def __init__(self):
        super().__init__()
        self.head = ITMHead(small_config())

    def forward(self, pooled, labels):
        return image_text_matching(self.head(pooled), labels)


@pytest.fixture
def objective():
    objective = Matching()
    shake(objective)
    return objective


POOLED = torch.randn(6, 2 * small_config().fusion.width, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0, 0, 1, 1, 0])


def probabilities(objective):
    """Return the probability of a match of each pair, from the weights of the head."""
    weight, bias = objective.head.classifier.weight.double(), objective.head.classifier.bias.double()
    odds = torch.exp((POOLED.double() @ weight[1] + bias[1]) - (POOLED.double() @ weight[0] + bias[0]))
    return (odds / (1 + odds)).tolist()


@torch.no_grad()
def test_loss_is_the_mean_negative_log_probability_of_the_right_class(objective):
    expected = [
        -math.log(probability if label else 1 - probability)
        for probability, label in zip(probabilities(objective), LABELS.tolist(), strict=True)
    ]
    assert float(objective(POOLED, LABELS).loss) == pytest.approx(sum(expected) / 6, rel=1e-5)


@torch.no_grad()
def test_accuracy_counts_the_pairs_that_are_classified_correctly(objective):
    right = [
        (probability > 0.5) == bool(label) for probability, label in zip(probabilities(objective), LABELS, strict=True)
    ]
    assert 0 < sum(right) < 6
    assert objective(POOLED, LABELS).metrics["accuracy/itm"].tolist() == [sum(right), 6]


def test_loss_is_float32_under_bfloat16(objective):
    result = objective.bfloat16()(POOLED.bfloat16(), LABELS)
    assert result.loss.dtype == torch.float32 and not result.metrics["loss/itm"].requires_grad
