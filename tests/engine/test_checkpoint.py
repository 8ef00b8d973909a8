"""Checkpoints are data, never code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.engine.checkpoint import Checkpoints, TrainState, find_checkpoint
from bridgetower.engine.checkpoint_files import load_file, read_description
from bridgetower.errors import CheckpointError


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_file_with_code_is_refused_and_the_code_not_run(tmp_path):
    torch.save({"module": Malicious(tmp_path / "harm")}, tmp_path / "weights.pt")
    # The trap works: torch's own loader would fall into it.
    torch.load(tmp_path / "weights.pt", weights_only=False)
    (tmp_path / "harm").rmdir()
    with pytest.raises(CheckpointError, match="may carry code"):
        load_file(tmp_path / "weights.pt")
    assert not (tmp_path / "harm").exists()


def test_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"module": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="resume from an earlier checkpoint"):
        load_file(path)


def test_folder_without_its_description_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint"):
        read_description(tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        find_checkpoint(tmp_path)


def test_description_of_another_version_is_refused(tmp_path):
    (tmp_path / "COMPLETE.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        read_description(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", 3).find_newest_intact() is None


def test_checkpoints_that_are_all_damaged_are_an_error_and_not_a_fresh_start(tmp_path):
    (tmp_path / "step0000005").mkdir()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is intact"):
        Checkpoints(tmp_path, 3).find_newest_intact()


class Engine:
    """What a checkpoint asks of DeepSpeed's engine: that it writes its files through ``checkpoint_engine``."""

    checkpoint_engine: Any = None

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        (Path(folder) / tag).mkdir(parents=True)
        self.checkpoint_engine.save({"module": torch.zeros(2)}, f"{folder}/{tag}/mp_rank_00_model_states.pt")


def damage(checkpoint):
    with (checkpoint / "mp_rank_00_model_states.pt").open("r+b") as file:
        file.write(b"damage")


@pytest.mark.parametrize("keep_last", [1, 2, 3, 0])
def test_checkpoints_of_later_steps_that_a_run_came_back_from_never_push_out_good_ones(tmp_path, keep_last):
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (200, 300, 400):
        checkpoints.save(Engine(), TrainState(step=step))
    if keep_last == 1:  # all three are there again, as after a lower keep_last was set
        checkpoints = Checkpoints(tmp_path, 3)
        checkpoints.save(Engine(), TrainState(step=300))
        checkpoints.save(Engine(), TrainState(step=400))
        checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (300, 400):
        if (tmp_path / f"step0000{step}").exists():
            damage(tmp_path / f"step0000{step}")
    # The run goes on from 200 and saves at 250, before the damaged ones.
    saved = checkpoints.save(Engine(), TrainState(step=250))
    assert checkpoints.find_newest_intact() == saved
    assert (tmp_path / "latest").read_text() == "step0000250"
    assert not [path for path in tmp_path.glob("step*") if path.name > "step0000250"]
