"""The command line of the evaluation. What it computes is tested in integration/."""

from __future__ import annotations

import pytest

from bridgetower.config.overrides import apply_overrides
from bridgetower.config.snapshot import Identity, write_run_file
from pretrain.presets import tiny
from tests.conftest import run_script


@pytest.fixture
def run_folder(tmp_path):
    """A run that has written its settings and no checkpoint."""
    identity = Identity(data_digests={}, optimizer="torch", precision="fp32", contrast_pairs=0)
    config = apply_overrides(tiny(), {"data.eval_shards": ""})
    write_run_file(tmp_path, config, identity, world_size=1, device="cpu")
    return tmp_path


def refused(words, said):
    result = run_script("pretrain/evaluate_run.py", *words, code=2)
    assert result.stderr.startswith("error: ") and said in result.stderr and "Traceback" not in result.stderr


def test_run_without_held_out_data_is_answered_with_the_setting_that_gives_it(run_folder):
    refused([str(run_folder)], "Give --data.eval_shards=DIR")


def test_setting_that_means_nothing_to_an_evaluation_is_refused(run_folder):
    refused([str(run_folder), "--optim.base_lr=1"], "Unknown setting --optim.base_lr")


def test_run_without_a_checkpoint_is_refused(run_folder, emoji_shards):
    words = [str(run_folder), f"--data.eval_shards={emoji_shards / 'concept'}"]
    refused(words, "nor a run folder with checkpoints in it")


def test_missing_run_is_refused(tmp_path):
    refused([str(tmp_path / "none")], f"There is no {tmp_path / 'none' / 'run.json'}")


def test_help_prints_the_usage_without_a_run():
    assert "RUN is a run folder" in run_script("pretrain/evaluate_run.py", "--help").stdout
    refused([], "Which run?")
