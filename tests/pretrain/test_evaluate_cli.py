"""The command line of evaluate_run.py. What it computes is tested in integration/."""

from __future__ import annotations

import pytest

from bridgetower.config.overrides import apply_overrides
from bridgetower.config.snapshot import Identity, write_run_file
from pretrain.presets import tiny
from tests.conftest import run_script


@pytest.fixture
def run_folder(tmp_path, emoji_shards):
    """Return the folder of a run on the training split that has a run.json and no checkpoint."""
    return start_run(tmp_path, emoji_shards / "train")


def start_run(folder, train_shards):
    identity = Identity(data_digests={}, optimizer="torch", precision="fp32", contrast_pairs=0)
    config = apply_overrides(tiny(), {"data.train_shards": str(train_shards), "data.eval_shards": ""})
    write_run_file(folder, config, identity, world_size=1, device="cpu")
    return folder


def refused(words, said):
    result = run_script("pretrain/evaluate_run.py", *words, code=2)
    assert result.stderr.startswith("error: ") and said in result.stderr and "Traceback" not in result.stderr


def test_run_without_held_out_data_is_refused_with_the_setting_that_gives_some(run_folder):
    refused([str(run_folder)], "Give --data.eval_shards=DIR")


def test_setting_that_has_no_effect_on_an_evaluation_is_refused(run_folder):
    refused([str(run_folder), "--optim.base_lr=1"], "Unknown setting --optim.base_lr")


def test_run_without_a_checkpoint_is_refused(run_folder, emoji_shards):
    words = [str(run_folder), f"--data.eval_shards={emoji_shards / 'concept'}"]
    refused(words, "nor a run folder with checkpoints in it")


def test_images_that_the_run_has_trained_on_are_refused_as_held_out_images(run_folder, emoji_shards):
    said = "3,457 images of the held-out"
    refused([str(run_folder), f"--data.eval_shards={emoji_shards / 'combination'},{emoji_shards / 'train'}"], said)


def test_without_the_training_data_a_run_is_scored_with_a_warning(tmp_path, emoji_shards):
    words = [str(start_run(tmp_path, "/nowhere/train")), f"--data.eval_shards={emoji_shards / 'concept'}"]
    said = run_script("pretrain/evaluate_run.py", *words, code=2).stderr
    assert "are not compared with the training images: The shard folder /nowhere/train does not exist" in said
    # The run got as far as its weights, which do not exist.
    assert "nor a run folder with checkpoints in it" in said


def test_missing_run_is_refused(tmp_path):
    refused([str(tmp_path / "none")], f"There is no {tmp_path / 'none' / 'run.json'}")


def test_help_prints_the_usage_without_a_run():
    assert "RUN is a run folder" in run_script("pretrain/evaluate_run.py", "--help").stdout
    refused([], "Which run?")
