"""The loss and score of VQA against an explicit formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridgetower.objectives.vqa import question_answering


def random_case(pairs: int = 6, answers: int = 9):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(pairs, answers)) * 3
    target = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], size=(pairs, answers))
    return logits, target


def test_loss_is_the_mean_binary_cross_entropy_times_the_number_of_answers():
    logits, target = random_case()
    probability = 1 / (1 + np.exp(-logits))
    losses = -(target * np.log(probability) + (1 - target) * np.log(1 - probability))
    result = question_answering(torch.tensor(logits), torch.tensor(target, dtype=torch.float32))
    assert result.loss.item() == pytest.approx(losses.mean() * losses.shape[1], rel=1e-5)
    assert result.values["loss/vqa"].tolist() == pytest.approx(losses.sum(axis=1).tolist(), rel=1e-5)


def test_score_is_the_soft_score_of_the_top_answer():
    logits, target = random_case()
    result = question_answering(torch.tensor(logits), torch.tensor(target, dtype=torch.float32))
    scores = [float(target[row, logits[row].argmax()]) for row in range(len(logits))]
    assert result.values["score/vqa"].tolist() == pytest.approx(scores)
    assert result.metrics["score/vqa"].tolist() == pytest.approx([sum(scores), len(scores)])
    assert 0 < sum(scores) < len(scores)
