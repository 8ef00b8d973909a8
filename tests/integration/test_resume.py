"""A run that is stopped and resumed, anywhere, ends bit for bit like one that was never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pretrain import trace
from tests.conftest import REPO, command_line, preloaded_server, script_environment
from tests.integration.runs import (
    assert_same_tensors,
    metrics,
    optimizer_tensors,
    relative_difference,
    settings,
    train,
    weights,
)

STEPS = 8
# With dropout, so that its random numbers must match too.
WITH_DROPOUT = ["--model.text.dropout=0.1", "--model.fusion.dropout=0.1"]


@pytest.fixture(scope="module")
def root(emoji_shards, tmp_path_factory) -> Path:
    """Train the run "whole" on two ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, emoji_shards, "whole", STEPS, *WITH_DROPOUT, "--checkpoint.every_steps=3", ranks=2)
    return folder


def assert_same_run(root, name):
    assert metrics(root, name) == metrics(root, "whole")
    ours, whole = weights(root, name), weights(root, "whole")
    assert ours.keys() == whole.keys()
    assert_same_tensors(list(ours.values()), list(whole.values()))
    assert_same_tensors(optimizer_tensors(root, name), optimizer_tensors(root, "whole"))


def start(root, shards, name, *more):
    """Start a run of two ranks with loader workers, which prefetch, and wait until it has done some steps."""
    workers = "--data.workers=1"
    arguments = settings(root, shards, name, STEPS, *WITH_DROPOUT, workers, "--checkpoint.every_steps=3", *more)
    process = subprocess.Popen(
        command_line("pretrain/train.py", arguments, ranks=2),
        cwd=REPO,
        env=script_environment({}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = root / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 4):
        assert process.poll() is None, "the run ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def find_ranks() -> list[psutil.Process]:
    """Find the processes of the run that is going on."""
    return psutil.Process(preloaded_server().process.pid).children()


def test_usr1_on_one_rank_saves_exits_75_and_the_run_resumes(root, emoji_shards):
    process = start(root, emoji_shards, "stopped")
    find_ranks()[0].send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 75
    stopped_at = len(metrics(root, "stopped"))
    assert 4 <= stopped_at < STEPS
    train(root, emoji_shards, "stopped", STEPS, *WITH_DROPOUT, "--checkpoint.every_steps=3", ranks=2)
    assert_same_run(root, "stopped")


def test_killed_run_resumes_from_its_last_checkpoint(root, emoji_shards):
    process = start(root, emoji_shards, "killed")
    for rank in find_ranks():
        for process_of_rank in [*rank.children(recursive=True), rank]:
            process_of_rank.kill()
    process.wait(timeout=60)
    output = train(root, emoji_shards, "killed", STEPS, *WITH_DROPOUT, "--checkpoint.every_steps=3", ranks=2)
    assert "resuming from" in output.stderr and "step 3" in output.stderr
    assert_same_run(root, "killed")


def test_half_written_and_damaged_checkpoints_are_passed_over(root, emoji_shards):
    copy_run(root, "damaged", keep=["step0000003", "step0000006", "step0000008"])
    folder = root / "damaged/checkpoints"
    # A kill while step 8 is written leaves an unfinished folder; a bad disk damages step 6.
    (folder / "step0000008").rename(folder / "unfinished-step0000008")
    (folder / "unfinished-step0000008/COMPLETE.json").unlink()
    victim = next((folder / "step0000006").glob("*optim_states.pt"))
    with victim.open("r+b") as file:  # the size stays the same, so only the checksum shows it
        file.seek(victim.stat().st_size // 2)
        file.write(b"\0\1\2\3\4\5\6\7" * 4)
    output = train(root, emoji_shards, "damaged", STEPS, *WITH_DROPOUT, "--checkpoint.every_steps=3", ranks=2)
    assert "Falling back" in output.stderr and "step 3, " in output.stderr
    assert_same_run(root, "damaged")
    assert not list(folder.glob("unfinished-*"))


def read_recorded_pairs(root, name, first_step):
    """Read the pairs that all ranks got from the program that started with a step, in the order of the stream."""
    files = (root / name / "pairs").glob(f"from-step{first_step:07d}-rank*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(map(without_cut, lines), key=lambda line: line["position"])


def without_cut(line):
    return {name: value for name, value in line.items() if name not in ("rank", "micro_step")}


def stream_settings(shards):
    """Build the arguments of the short runs that the stream depends on."""
    words = settings(Path(), shards, "x", 6)
    return [word for word in words if word.startswith("--data.")]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(0, 64), (1, 32)], ids=["joined", "accumulated"])
def test_run_resumes_at_another_world_size(root, emoji_shards, capsys, ranks, micro_batch_size):
    # Dropout differs between ranks, so runs without it are compared, and only approximately.
    name = f"resized_{micro_batch_size}"
    calm = ["--engine.deepspeed=zero2_fp32", "--objectives.itc=false", "--optim.eps=1e-3", "--checkpoint.every_steps=3"]
    calm += ["--data.record_pairs=true"]
    if not (root / "calm").exists():
        train(root, emoji_shards, "calm", 6, *calm, ranks=2)
    copy_run(root, name, keep=["step0000003"], source="calm")
    train(root, emoji_shards, name, 6, *calm, f"--data.micro_batch_size={micro_batch_size}", ranks=ranks)
    ours, whole = weights(root, name), weights(root, "calm")
    assert max(relative_difference(ours[n], whole[n]) for n in whole if n.endswith("weight")) < 1e-6
    # It got the pairs, masks and negatives of the undisturbed run, which trace.py prints too.
    undisturbed = read_recorded_pairs(root, "calm", 1)
    assert read_recorded_pairs(root, name, 4) == [line for line in undisturbed if line["step"] > 3]
    trace.main(
        "tiny", steps="6", **dict(word.removeprefix("--").split("=", 1) for word in stream_settings(emoji_shards))
    )
    traced = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [without_cut(line) for line in traced] == undisturbed
    # Resume once more, on two ranks again.
    shutil.rmtree(root / name / "checkpoints/step0000006")
    train(root, emoji_shards, name, 6, *calm, ranks=2)
    assert max(relative_difference(weights(root, name)[n], whole[n]) for n in whole if n.endswith("weight")) < 1e-6


def test_other_settings_are_refused(root, emoji_shards):
    output = train(root, emoji_shards, "whole", STEPS, *WITH_DROPOUT, "--optim.base_lr=0.5", ranks=0, code=2)
    assert "optim.base_lr: 0.001 -> 0.5" in output.stderr and "--name" in output.stderr
    # On one rank with the same micro-batch, ITC would compare half as many pairs.
    assert "pairs that ITC compares (data.micro_batch_size x ranks): 64 -> 32" in output.stderr


def test_command_that_starts_from_another_runs_checkpoint_can_be_repeated(root, emoji_shards):
    # Slurm repeats it after a requeue. At first the run starts from there, then it resumes from its own checkpoint.
    origin = root / "whole/checkpoints/step0000003"
    from_there = [*WITH_DROPOUT, "--checkpoint.every_steps=3", f"--resume={origin}"]
    output = train(root, emoji_shards, "branch", STEPS, *from_there, ranks=2)
    assert f"resuming from {origin}: step 3" in output.stderr
    ours, whole = weights(root, "branch"), weights(root, "whole")
    assert_same_tensors(list(ours.values()), list(whole.values()))
    output = train(root, emoji_shards, "branch", STEPS, *from_there, "--data.micro_batch_size=64")
    assert "branch is complete" in output.stderr
    # To go back to an earlier checkpoint is another run, so it is refused.
    for resume, message in (
        (root / "whole/checkpoints/step0000006", "did not start from resume="),
        ("never", "already holds a run with checkpoints"),
    ):
        output = train(root, emoji_shards, "branch", STEPS, *WITH_DROPOUT, f"--resume={resume}", ranks=0, code=2)
        assert message in output.stderr and "--resume=auto" in output.stderr
    output = train(root, emoji_shards, "new", STEPS, *WITH_DROPOUT, "--resume=/nowhere", ranks=0, code=2)
    assert "neither a run folder nor a checkpoint" in output.stderr


def test_a_second_program_in_the_same_run_folder_is_refused(root, emoji_shards):
    process = start(root, emoji_shards, "once")
    processes = [each for rank in find_ranks() for each in (rank, *rank.children(recursive=True))]
    try:
        for each in processes:
            each.suspend()  # so that the run does not end meanwhile
        # One rank with all 64 pairs is the same run as two ranks with 32 each, so only the lock can refuse it.
        more = ["--checkpoint.every_steps=3", "--data.micro_batch_size=64"]
        output = train(root, emoji_shards, "once", STEPS, *WITH_DROPOUT, *more, code=2)
        assert "Another program is writing to" in output.stderr
    finally:
        for each in processes:
            each.kill()
        process.wait(timeout=60)


def copy_run(root, name, *, keep, source="whole"):
    """Copy a run, but only the checkpoints ``keep``."""
    shutil.copytree(root / source, root / name)
    for folder in (root / name / "checkpoints").glob("step*"):
        if folder.name not in keep:
            shutil.rmtree(folder)
    run = root / name / "run.json"
    run.write_text(run.read_text().replace(f'"name": "{source}"', f'"name": "{name}"'))
