"""What the training loop saves, and what it refuses to save."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bridgetower.engine.checkpoint import Checkpoints, TrainState
from bridgetower.engine.loop import TrainingPlan, train
from bridgetower.engine.tracker import Tracker
from bridgetower.errors import TrainingError
from tests.small_models import random_batch

PLAN = TrainingPlan(
    total_steps=4,
    accumulation_steps=1,
    global_batch_size=4,
    log_every_steps=1,
    checkpoint_every_steps=1,
    evaluate_every_steps=0,
    seed=0,
    num_pairs=8,
)


class Engine:
    """An engine whose loss is always finite. Its gradient and weights are as the test wants them."""

    def __init__(self, grad_norm: float, weight: float) -> None:
        self.module, self.device, self.skipped_steps = nn.Linear(1, 1), torch.device("cpu"), 0
        self.optimizer = SimpleNamespace(param_groups=[{"name": "base", "lr": 0.1}])
        self.grad_norm, self.weight = grad_norm, weight

    def __call__(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.ones(()), {"loss/mlm": torch.ones(2), "tokens_per_pair": torch.ones(2)}

    def train(self) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> None:
        nn.init.constant_(self.module.weight, self.weight)

    def get_global_grad_norm(self) -> float:
        return self.grad_norm


class NotedCheckpoints(Checkpoints):
    """Notes the steps that would have been saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, engine: Any, state: TrainState) -> Any:
        self.steps.append(state.step)


def run(tmp_path, saved, plan=PLAN, evaluate=lambda step: {}, stops_at=0, **lost) -> bool:
    tracker = Tracker(
        tmp_path, total_steps=4, first_step=0, wandb_mode="off", wandb_project="", wandb_entity="", run_config={}
    )
    state = TrainState()
    services = {"tracker": tracker, "checkpoints": saved, "evaluate": evaluate}
    services["stop"] = SimpleNamespace(agree=lambda device: state.step == stops_at)
    engine = Engine(**{"grad_norm": 1.0, "weight": 0.5, **lost})
    try:
        return train(engine, repeat(random_batch()), plan, state, rank=0, world_size=1, **services)
    finally:
        tracker.close()


def test_run_whose_figures_are_finite_is_saved_at_every_step(tmp_path):
    saved = NotedCheckpoints()
    run(tmp_path, saved)
    assert saved.steps == [1, 2, 3, 4]


def test_each_evaluation_comes_after_a_checkpoint_and_a_stop_does_not_wait_for_it(tmp_path):
    plan, saved, seen = replace(PLAN, checkpoint_every_steps=100, evaluate_every_steps=2), NotedCheckpoints(), []

    def evaluate(step: int) -> dict[str, float]:
        seen.append((step, list(saved.steps)))
        return {}

    assert run(tmp_path, saved, plan, evaluate)
    assert seen == [(2, [2]), (4, [2, 4])]
    assert not run(tmp_path, saved, plan, evaluate, stops_at=2)
    assert len(seen) == 2 and saved.steps == [2, 4, 2]


@pytest.mark.parametrize(
    ("lost", "message"),
    [({"grad_norm": float("nan")}, "optim/grad_norm is nan"), ({"weight": float("inf")}, "a weight is nan")],
    ids=["gradient", "weight"],
)
def test_nothing_is_saved_once_gradient_or_weights_are_not_finite_even_if_the_loss_is(tmp_path, lost, message):
    saved = NotedCheckpoints()
    with pytest.raises(TrainingError, match=f"{message} at step 1.*lower optim.base_lr"):
        run(tmp_path, saved, **lost)
    assert saved.steps == []
