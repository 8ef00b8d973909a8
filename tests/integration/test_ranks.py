"""Two ranks train like one rank with the joined batch, in float32 and without dropout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bridgetower.config.cli import config_from_cli
from pretrain.assemble import build_task
from pretrain.presets import PRESETS
from tests.integration.runs import (
    FLOAT32,
    NO_DROPOUT,
    SMALL_MODEL,
    metrics,
    relative_difference,
    train,
    weights,
)

# Every step changes the weights. AdamW divides by the gradient's size plus epsilon, so with the usual 1e-8 an element
# whose gradient is no larger than that makes steps of its rounding error. Measured: one element of 139,000 is then 97 %
# of the difference between two runs, which is 1.6e-6 with epsilon 1e-8 and 6e-8 with 1e-6.
EXACT = [*FLOAT32, *NO_DROPOUT, "--optim.warmup_fraction=0", "--optim.eps=1e-6"]
# The key bias cancels in the softmax: its true gradient is 0, and AdamW makes full steps of the rounding error.
KEY_BIASES = ("key.bias", "attn.in_proj_bias")


@pytest.fixture(scope="module")
def runs(emoji_shards, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(root, emoji_shards, "two_ranks", 5, *EXACT, ranks=2)
    train(root, emoji_shards, "joined", 5, *EXACT, "--data.micro_batch_size=64")
    return root


@pytest.fixture(scope="module")
def calm_runs(emoji_shards, tmp_path_factory) -> Path:
    """Train without ITC, which compares the pairs of one micro-step, so that accumulated halves are the same run too.

    AdamW's epsilon is above the rounding error of the gradients, so that each tensor can be compared by itself.
    """
    root = tmp_path_factory.mktemp("calm_runs")
    calm = [*EXACT, "--objectives.itc=false", "--optim.eps=1e-3"]
    train(root, emoji_shards, "two_ranks", 5, *calm, ranks=2)
    train(root, emoji_shards, "accumulated", 5, *calm)
    return root


def assert_same_metrics(root, one, other):
    lines, others = metrics(root, one), metrics(root, other)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, expected in zip(lines, others, strict=True):
        assert line.keys() == expected.keys()
        for name in line:
            assert line[name] == pytest.approx(expected[name], abs=1e-5), f"{name} at step {line['step']}"


def test_two_ranks_have_the_losses_of_the_joined_batch(runs):
    assert_same_metrics(runs, "two_ranks", "joined")


def test_two_ranks_end_with_the_weights_of_the_joined_batch(runs):
    trained, expected = weights(runs, "two_ranks"), weights(runs, "joined")
    assert trained.keys() == expected.keys()
    names = [name for name in trained if not name.endswith(KEY_BIASES)]
    assert relative_difference(join(trained, names), join(expected, names)) < 1e-6


def test_two_ranks_have_the_losses_of_accumulated_halves(calm_runs):
    assert_same_metrics(calm_runs, "two_ranks", "accumulated")


def test_two_ranks_end_with_every_weight_of_accumulated_halves(calm_runs):
    trained, expected = weights(calm_runs, "two_ranks"), weights(calm_runs, "accumulated")
    assert trained.keys() == expected.keys()
    for name in trained:
        # Biases are near 0 after five steps, so differences are compared with at least 0.02, a weight's usual size.
        size = max(float(expected[name].square().mean().sqrt()), 0.02)
        error = float((trained[name].double() - expected[name].double()).square().mean().sqrt())
        assert error / size < 1e-6, name


@pytest.mark.parametrize("fixture", ["runs", "calm_runs"])
def test_training_changed_every_tensor(fixture, request):
    # Otherwise the other tests would pass for a loop that does nothing.
    root = request.getfixturevalue(fixture)
    itc = ["false" if fixture == "calm_runs" else "true"]
    overrides = dict(flag[2:].split("=", 1) for flag in [*SMALL_MODEL, *NO_DROPOUT, f"--objectives.itc={itc[0]}"])
    initial = build_task(config_from_cli(PRESETS, "tiny", [], overrides, "")).state_dict()
    trained = weights(root, "two_ranks")
    assert trained.keys() == initial.keys()
    unchanged = [name for name in trained if torch.equal(trained[name], initial[name])]
    # The key bias has no effect. If projections are absorbed, its gradient is exactly 0.
    assert all(re.search(r"text_layers\.\d+\.cross_attention\.key\.bias$", name) for name in unchanged), unchanged


def join(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])
