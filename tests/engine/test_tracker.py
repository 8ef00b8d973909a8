"""metrics.jsonl holds each step once, whatever the lives of a run."""

from __future__ import annotations

import json

import pytest
import torch

from bridgetower.engine.tracker import Means, Tracker, read_metrics


def open_tracker(folder, first_step):
    return Tracker(
        folder,
        total_steps=10,
        first_step=first_step,
        wandb_mode="off",
        wandb_project="",
        wandb_entity="",
        run_config={},
    )


def test_steps_after_the_one_resumed_from_are_dropped(tmp_path):
    tracker = open_tracker(tmp_path, 0)
    for step in (1, 2, 3):
        tracker.write(step, {"a": step / 3})
    tracker.close()
    tracker = open_tracker(tmp_path, 2)
    tracker.write(3, {"a": 0.5})
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path)[-1]["a"] == 0.5


def test_line_that_a_kill_cut_short_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    open_tracker(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n'


def test_every_line_is_strict_json(tmp_path):
    tracker = open_tracker(tmp_path, 0)
    tracker.write(1, {"train/loss/mlm": 1 / 3, "speed/pairs_per_second": 12345678.9})
    tracker.write(2, {})  # nothing to say is no line
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss/mlm": 0.3333333, "speed/pairs_per_second": 12345680.0}
    ]


def test_means_weigh_by_count_and_start_anew():
    means = Means()
    means.add({"accuracy": torch.tensor([3.0, 4.0]), "loss": torch.tensor([2.0, 1.0])})
    means.add({"accuracy": torch.tensor([0.0, 2.0]), "loss": torch.tensor([4.0, 1.0])})
    assert means.take() == pytest.approx({"accuracy": 0.5, "loss": 3.0})
    assert means.take() == {}


def test_mean_of_nothing_is_left_out():
    means = Means()
    means.add({"accuracy": torch.tensor([0.0, 0.0])})  # a micro-batch without a masked token
    assert means.take() == {}
