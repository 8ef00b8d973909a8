"""Failures of long runs end in a clear error, and nothing that was saved is lost."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO, command_line, script_environment
from tests.integration.runs import metrics, settings, train, weights


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_full_disk_ends_the_run_and_keeps_the_last_checkpoint(root, emoji_shards):
    every = ["--checkpoint.every_steps=2"]
    train(root, emoji_shards, "full", 4, *every)
    checkpoints = root / "full/checkpoints"
    for file in sorted((checkpoints / "step0000004").iterdir()):
        file.unlink()
    (checkpoints / "step0000004").rmdir()
    before = {file.name: file.read_bytes() for file in (checkpoints / "step0000002").iterdir()}
    # No file may grow beyond 100 kB, which acts like a full disk.
    process = subprocess.run(
        command_line("pretrain/train.py", settings(root, emoji_shards, "full", 4, *every)),
        cwd=REPO,
        env=script_environment({}),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2, process.stderr
    assert "The checkpoint could not be saved" in process.stderr and "free space" in process.stderr
    assert "Traceback" not in process.stderr
    assert {file.name: file.read_bytes() for file in (checkpoints / "step0000002").iterdir()} == before
    assert {path.name for path in checkpoints.glob("*step*")} == {"step0000002"}
    # With free space again, the run resumes and comes to its end.
    train(root, emoji_shards, "full", 4, *every)
    assert weights(root, "full") and metrics(root, "full")[-1]["step"] == 4


def test_diverged_run_stops_without_saving_its_weights(root, emoji_shards):
    diverging = ["--optim.base_lr=1e30", "--optim.max_grad_norm=0", "--checkpoint.every_steps=1"]
    output = train(root, emoji_shards, "wild", 20, *diverging, code=1)
    assert "training diverged, and this step was not saved" in output.stderr and "optim.base_lr" in output.stderr
    assert "Traceback" not in output.stderr
    assert len(list((root / "wild/checkpoints").glob("step*"))) >= 1
    assert all(tensor.isfinite().all() for tensor in weights(root, "wild").values())


def test_only_the_newest_checkpoints_are_kept(root, emoji_shards):
    train(root, emoji_shards, "kept", 5, "--checkpoint.every_steps=1", "--checkpoint.keep_last=2")
    names = sorted(path.name for path in (root / "kept/checkpoints").iterdir() if path.is_dir())
    assert names == ["step0000004", "step0000005"]
    assert (root / "kept/checkpoints/latest").read_text() == "step0000005"
