"""The loss and accuracy of SNLI-VE and NLVR2 against an explicit formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bridgetower.objectives.classification import classification


def test_loss_is_the_negative_log_probability_of_the_right_class():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    label = np.array([0, 2, 1, 1, 2])
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), label]
    result = classification("snli_ve", torch.tensor(logits), F.one_hot(torch.tensor(label), 3).float())
    assert result.loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    right = logits.argmax(axis=1) == label
    assert result.values["accuracy/snli_ve"].tolist() == right.tolist()
    assert result.metrics["accuracy/snli_ve"].tolist() == [right.sum(), 5]
