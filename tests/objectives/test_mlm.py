"""Masked language modelling: the published loss, at the masked positions only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bridgetower.data.choices import mlm_weights
from bridgetower.model.heads import MLMHead
from bridgetower.objectives.mlm import masked_language_modeling
from tests.small_models import shake, small_config

WIDTH = small_config().fusion.width
NOT_TIED = torch.empty(0)


class Modeling(nn.Module):
    """The head at the masked positions, and the loss of its logits."""

    def __init__(self):
        super().__init__()
        self.head = MLMHead(small_config())

    def logits(self, states, index):
        return self.head(states.flatten(0, 1)[index], NOT_TIED)

    def forward(self, states, index, labels, weights):
        return masked_language_modeling(self.logits(states, index), labels, weights)


@pytest.fixture
def objective():
    objective = Modeling()
    shake(objective)
    return objective


def masked(pairs, tokens, masked_fraction=0.3, seed=0):
    """Return states, and the flat indices and labels of masked tokens."""
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(pairs, tokens, WIDTH, generator=rng)
    index = torch.nonzero(torch.rand(pairs * tokens, generator=rng) < masked_fraction).flatten()
    return states, index, torch.randint(0, 50, (len(index),), generator=rng)


def weights_of(index, tokens, pairs, group):
    return torch.from_numpy(mlm_weights(index.numpy(), tokens, pairs, group))


def token_loss(objective, states, position, label):
    """Return the loss of one token in nats, from its probability."""
    row, column = divmod(int(position), states.shape[1])
    logits = objective.head(states[row, column][None], NOT_TIED)[0].double()
    return -float(torch.log(torch.exp(logits) / torch.exp(logits).sum())[label])


@torch.no_grad()
def test_loss_is_the_mean_of_negative_log_probabilities_over_the_masked_tokens(objective):
    states, index, labels = masked(4, 6)
    expected = np.mean(
        [token_loss(objective, states, position, label) for position, label in zip(index, labels, strict=True)]
    )
    result = objective(states, index, labels, weights_of(index, 6, 4, group=4))
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_over_groups_of_the_mean_in_each(objective):
    # Published: the mean over a micro-batch, averaged over micro-batches. A group stands for such a micro-batch.
    states, index, labels = masked(6, 5)
    groups: list[list[float]] = [[], [], []]
    for position, label in zip(index.tolist(), labels, strict=True):
        groups[position // 5 // 2].append(token_loss(objective, states, position, label))
    assert len({len(group) for group in groups}) > 1, "groups of equal size could not show the difference"
    result = objective(states, index, labels, weights_of(index, 5, 6, group=2))
    assert float(result.loss) == pytest.approx(np.mean([np.mean(group) for group in groups]), rel=1e-5)


@torch.no_grad()
def test_loss_does_not_depend_on_how_a_batch_is_split(objective):
    states, index, labels = masked(8, 5)
    whole = objective(states, index, labels, weights_of(index, 5, 8, group=2)).loss
    losses = []
    for first in (0, 4):
        is_in_half = (index // 5 >= first) & (index // 5 < first + 4)
        half_index, half_labels = index[is_in_half] - first * 5, labels[is_in_half]
        weights = weights_of(half_index, 5, 4, group=2)
        losses.append(objective(states[first : first + 4], half_index, half_labels, weights).loss)
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_loss_is_float32_and_reaches_only_the_states_of_masked_tokens(objective):
    states, index, labels = masked(3, 4)
    states = states.bfloat16().requires_grad_()
    loss = objective.bfloat16()(states, index, labels, weights_of(index, 4, 3, group=3)).loss
    assert loss.dtype == torch.float32
    loss.backward()
    touched = states.grad.flatten(0, 1).abs().sum(dim=-1).nonzero().flatten()
    assert touched.tolist() == index.tolist()


@torch.no_grad()
def test_accuracy_counts_the_tokens_whose_top_word_is_right(objective):
    states, index, _ = masked(4, 6)
    best = objective.logits(states, index).argmax(dim=-1)
    labels = best.clone()
    labels[:2] = (labels[:2] + 1) % 50
    metrics = objective(states, index, labels, weights_of(index, 6, 4, group=4)).metrics
    assert metrics["accuracy/mlm"].tolist() == [len(index) - 2, len(index)]


def test_metrics_carry_no_gradient(objective):
    states, index, labels = masked(4, 6)
    metrics = objective(states.requires_grad_(), index, labels, weights_of(index, 6, 4, group=4)).metrics
    assert not any(value.requires_grad for value in metrics.values())
