"""metrics.jsonl holds each step once, however often a run is resumed; W&B gets every line once."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from bridgetower.engine.metrics_file import read_metrics
from bridgetower.engine.tracker import Means, Tracker, _format_time
from bridgetower.errors import ConfigError
from tests.conftest import REPO
from tests.wandb_files import read_history


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
    tracker.write(2, {})  # writes no line
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss/mlm": 0.3333333, "speed/pairs_per_second": 12345680.0}
    ]


def test_means_are_weighted_by_count_and_start_anew():
    means = Means()
    means.add({"accuracy": torch.tensor([3.0, 4.0]), "loss": torch.tensor([2.0, 1.0])})
    means.add({"accuracy": torch.tensor([0.0, 2.0]), "loss": torch.tensor([4.0, 1.0])})
    assert means.take() == pytest.approx({"accuracy": 0.5, "loss": 3.0})
    assert means.take() == {}


def test_mean_of_nothing_is_left_out():
    means = Means()
    means.add({"accuracy": torch.tensor([0.0, 0.0])})  # a micro-batch without a masked token
    assert means.take() == {}


def make_metrics(step: int) -> dict[str, float]:
    return {"a": step / 3}


def open_online(folder, monkeypatch, first_step=0):
    """Open a tracker with a key for a server that does not exist."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return Tracker(
        folder,
        total_steps=10,
        first_step=first_step,
        wandb_mode="online",
        wandb_project="p",
        wandb_entity="",
        run_config={},
    )


def test_outage_of_wandb_loses_no_line_and_ends_with_a_suggestion(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("bridgetower.engine.wandb_mirror._PATIENCE_SECONDS", 4.0)
    tracker = open_online(tmp_path, monkeypatch)
    for step in (1, 2, 3):
        tracker.write(step, make_metrics(step))
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert "W&B did not answer for 4 s" in caplog.text and "wandb sync" in caplog.text
    assert not (tmp_path / "wandb_sent").exists()


def test_online_without_a_key_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="wandb login"):
        Tracker(
            tmp_path,
            total_steps=10,
            first_step=0,
            wandb_mode="online",
            wandb_project="",
            wandb_entity="",
            run_config={},
        )


def test_resumed_run_sends_only_what_was_not_sent(tmp_path):
    for last in (2, 4):
        tracker = Tracker(
            tmp_path,
            total_steps=10,
            first_step=last - 2,
            wandb_mode="offline",
            wandb_project="p",
            wandb_entity="",
            run_config={},
        )
        for step in (last - 1, last):
            tracker.write(step, make_metrics(step))
        tracker.close()
    assert (tmp_path / "wandb_sent").read_text() == "4"
    steps = [
        [line["_step"] for line in read_history(path)] for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    ]
    assert steps == [[1, 2], [3, 4]]
    assert len({path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1


@pytest.mark.parametrize(
    ("hours", "text"), [(55, "2 d 7 h"), (5.2, "5 h 12 min"), (0.05, "3 min"), (40 / 3600, "40 s")]
)
def test_time_left_has_its_two_largest_units_at_most(hours, text):
    assert _format_time(hours) == text


LIVE = """
import sys
from pathlib import Path
from bridgetower.engine.tracker import Tracker
folder = Path(sys.argv[1]) / "base_4m"
folder.mkdir()
tracker = Tracker(
    folder, total_steps=100_000, first_step=0, wandb_mode="off", wandb_project="", wandb_entity="", run_config={}
)
tracker.write(49_950, {
    "train/loss/total": 2.345, "train/loss/mlm": 1.901, "train/loss/itm": 0.444, "speed/pairs_per_second": 24123.0,
    "speed/mfu": 0.447, "data/wait_fraction": 0.013, "progress/eta_hours": 5.2,
})
tracker.close()
"""


@pytest.mark.parametrize(("columns", "has_objectives"), [(80, False), (140, True)])
def test_live_line_of_a_terminal_cuts_off_no_figure(tmp_path, columns, has_objectives):
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", LIVE, str(tmp_path)], stderr=slave, cwd=REPO, env=environment, check=True)
    os.close(slave)
    output = b""
    with suppress(OSError):  # raised at the end of a terminal
        while chunk := os.read(master, 1 << 16):
            output += chunk
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    for figure in ("base_4m", "49950/100000", "loss 2.345", "24123 pairs/s", "MFU 45%", "1%", "5 h 12 min left"):
        assert figure in text
    assert ("mlm 1.901" in text) == has_objectives
