"""Two ranks are one rank with the joined batch, in float32 and without dropout."""

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

# Every step changes the weights. With AdamW's usual epsilon of 1e-8, single elements whose gradient is no larger than
# that make steps of its rounding: measured, one of 139,000 is then 97 % of the difference between two runs (1.6e-6;
# with 1e-6 it is 6e-8).
EXACT = [*FLOAT32, *NO_DROPOUT, "--optim.warmup_fraction=0", "--optim.eps=1e-6"]
# Softmax does not change with the bias of its keys: the true gradient is 0, and AdamW makes full steps of its rounding.
KEY_BIASES = ("key.bias", "attn.in_proj_bias")


@pytest.fixture(scope="module")
def runs(emoji_shards, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(root, emoji_shards, "two_ranks", 5, *EXACT, ranks=2)
    train(root, emoji_shards, "joined", 5, *EXACT, "--data.micro_batch_size=64")
    return root


@pytest.fixture(scope="module")
def calm_runs(emoji_shards, tmp_path_factory) -> Path:
    """Without ITC, which compares the pairs of one micro-step, so that accumulated halves are the same run too.

    AdamW's epsilon stands above the rounding of gradients, so that each tensor by itself is compared.
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
    found, expected = weights(runs, "two_ranks"), weights(runs, "joined")
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.endswith(KEY_BIASES)]
    assert relative_difference(join(found, names), join(expected, names)) < 1e-6


def test_two_ranks_have_the_losses_of_accumulated_halves(calm_runs):
    assert_same_metrics(calm_runs, "two_ranks", "accumulated")


def test_two_ranks_end_with_every_weight_of_accumulated_halves(calm_runs):
    found, expected = weights(calm_runs, "two_ranks"), weights(calm_runs, "accumulated")
    assert found.keys() == expected.keys()
    for name in found:
        # Biases are near 0 after five steps: a weight's usual size is the smallest that differences are compared with.
        size = max(float(expected[name].square().mean().sqrt()), 0.02)
        error = float((found[name].double() - expected[name].double()).square().mean().sqrt())
        assert error / size < 1e-6, name


@pytest.mark.parametrize("fixture", ["runs", "calm_runs"])
def test_training_changed_every_tensor(fixture, request):
    # Otherwise the tests above would hold for a loop that does nothing.
    root = request.getfixturevalue(fixture)
    itc = ["false" if fixture == "calm_runs" else "true"]
    overrides = dict(flag[2:].split("=", 1) for flag in [*SMALL_MODEL, *NO_DROPOUT, f"--objectives.itc={itc[0]}"])
    initial = build_task(config_from_cli(PRESETS, "tiny", [], overrides, "")).state_dict()
    trained = weights(root, "two_ranks")
    assert trained.keys() == initial.keys()
    unchanged = [name for name in trained if torch.equal(trained[name], initial[name])]
    # The bias of keys has no effect; where projections are absorbed, its gradient is not even rounding.
    assert all(re.search(r"text_layers\.\d+\.cross_attention\.key\.bias$", name) for name in unchanged), unchanged


def join(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])
