"""Checkpoints are data, never code, and are read without DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.engine.checkpoint import Checkpoints, TrainState, find_checkpoint
from bridgetower.engine.checkpoint_files import load_file, read_description
from bridgetower.errors import CheckpointError
from tests.conftest import REPO


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_file_with_code_is_refused_and_the_code_not_run(tmp_path):
    torch.save({"module": Malicious(tmp_path / "harm")}, tmp_path / "weights.pt")
    # The file does carry code: torch's full unpickler runs it.
    torch.load(tmp_path / "weights.pt", weights_only=False)
    (tmp_path / "harm").rmdir()
    with pytest.raises(CheckpointError, match="may carry code"):
        load_file(tmp_path / "weights.pt")
    assert not (tmp_path / "harm").exists()


READ_WITHOUT_DEEPSPEED = """
import sys
from pathlib import Path
from bridgetower.engine.checkpoint_files import load_file
content = load_file(Path(sys.argv[1]))
assert content["stage"] == 2 and content["loss_scaler"].cur_scale == 1.0 and content["slices"]["w"].numel == 3
assert content["weights"].tolist() == [0, 1]
assert not any(name.split(".")[0] == "deepspeed" for name in sys.modules)
"""


def test_files_with_deepspeeds_classes_are_read_without_importing_deepspeed(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    content = {"stage": ZeroStageEnum.gradients, "loss_scaler": LossScaler(scale=1.0), "weights": torch.arange(2)}
    torch.save({**content, "slices": {"w": fragment_address(numel=3, start=0)}}, tmp_path / "file.pt")
    subprocess.run([sys.executable, "-c", READ_WITHOUT_DEEPSPEED, str(tmp_path / "file.pt")], cwd=REPO, check=True)


def test_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"module": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="resume from an earlier checkpoint"):
        load_file(path)


def test_folder_without_a_description_is_no_checkpoint(tmp_path):
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
    """Stands for DeepSpeed's engine, which writes its files through ``checkpoint_engine``."""

    checkpoint_engine: Any = None

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        (Path(folder) / tag).mkdir(parents=True)
        self.checkpoint_engine.save({"module": torch.zeros(2)}, f"{folder}/{tag}/mp_rank_00_model_states.pt")


def damage(checkpoint):
    with (checkpoint / "mp_rank_00_model_states.pt").open("r+b") as file:
        file.write(b"damage")


@pytest.mark.parametrize("keep_last", [1, 2, 3, 0])
def test_checkpoints_of_later_steps_never_push_out_intact_ones_after_a_resume(tmp_path, keep_last):
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (200, 300, 400):
        checkpoints.save(Engine(), TrainState(step=step))
    if keep_last == 1:  # write all three again, as if keep_last had been lowered since
        checkpoints = Checkpoints(tmp_path, 3)
        checkpoints.save(Engine(), TrainState(step=300))
        checkpoints.save(Engine(), TrainState(step=400))
        checkpoints = Checkpoints(tmp_path, keep_last)
    for step in (300, 400):
        if (tmp_path / f"step0000{step}").exists():
            damage(tmp_path / f"step0000{step}")
    # The run resumes from 200 and saves at 250, before the damaged ones.
    saved = checkpoints.save(Engine(), TrainState(step=250))
    assert checkpoints.find_newest_intact() == saved
    assert (tmp_path / "latest").read_text() == "step0000250"
    assert not [path for path in tmp_path.glob("step*") if path.name > "step0000250"]
