"""The job scripts on a real Slurm: trained together, interrupted in every way that Slurm has, and gone on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import run_script
from tests.finetune.corpora import settings, write_pretrained, write_task
from tests.integration.runs import metrics, weights
from tests.slurm.cluster import wait_for

STEPS = 60


def steps_done(jobs, run: str) -> int:
    path = jobs.root / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="session")
def undisturbed(jobs, emoji) -> str:
    """The number of the job that trained the run `undisturbed` on two nodes."""
    number = jobs.pretrain(emoji, "undisturbed", STEPS, PYTHON=sys.executable)
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    return number


def test_two_nodes_train_together(jobs, undisturbed):
    log, of_ranks = jobs.log(undisturbed), jobs.rank_logs(undisturbed)
    assert list(of_ranks) == ["rank00000.log", "rank00001.log"]
    assert "rank 0 on n1, restart 0" in of_ranks["rank00000.log"]
    assert "rank 1 on n2, restart 0" in of_ranks["rank00001.log"]
    # The merged log has both, labelled by task.
    assert "0: rank 0 on n1" in log and "1: rank 1 on n2" in log
    assert f"step {STEPS}/{STEPS}" in log and f"step {STEPS}/{STEPS}" in of_ranks["rank00000.log"]
    assert jobs.cluster.job(undisturbed)["NodeList"] == "n[1-2]"


def test_metrics_and_a_checkpoint_of_both_ranks_are_there(jobs, undisturbed):
    run = jobs.root / "undisturbed"
    lines = metrics(jobs.root, "undisturbed")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["train/loss/mlm"] < lines[0]["train/loss/mlm"]
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    checkpoint = run / "checkpoints" / (run / "checkpoints/latest").read_text()
    assert len(list(checkpoint.glob("*zero_pp_rank_*optim_states.pt"))) == 2


def assert_like_undisturbed(jobs, run: str) -> None:
    """Every loss of every step, and every weight, bit for bit."""
    assert metrics(jobs.root, run) == metrics(jobs.root, "undisturbed")
    found, expected = weights(jobs.root, run), weights(jobs.root, "undisturbed")
    assert found.keys() == expected.keys() and all(bool((found[name] == expected[name]).all()) for name in found)


def test_a_requeued_and_then_signalled_job_ends_like_an_undisturbed_one(jobs, emoji, undisturbed):
    number = jobs.pretrain(emoji, "disturbed", STEPS)
    wait_for(lambda: steps_done(jobs, "disturbed") >= 5, 120)
    jobs.cluster.call("scontrol", "requeue", number)
    wait_for(lambda: "restart 1" in jobs.log(number) and "resuming from" in jobs.log(number), 120)
    after = steps_done(jobs, "disturbed")
    assert 5 <= after < STEPS, "the job ended before it was requeued: give it more steps"
    wait_for(lambda: steps_done(jobs, "disturbed") >= after + 5, 120)
    jobs.cluster.call("scancel", "--signal=USR1", number)
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert jobs.cluster.job(number)["Restarts"] == "2"
    assert "stopped with a checkpoint; requeueing the job" in jobs.log(number)
    assert "rank 1 on n2, restart 2" in jobs.rank_logs(number)["rank00001.log"]
    assert_like_undisturbed(jobs, "disturbed")


def test_a_job_at_its_time_limit_goes_on_in_the_next(jobs, emoji, undisturbed):
    # The warning comes within half a minute, before the trainer is up: it is repeated until it is heard.
    python = jobs.root / "slow_python"
    first = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ]'
    python.write_text(f'#!/bin/sh\ncase $1 in -*) ;; *) {first} && sleep 45 ;; esac\nexec {jobs.python} "$@"\n')
    python.chmod(0o755)
    options = ("--time=4", "--signal=B:USR1@235")
    number = jobs.pretrain(emoji, "short", STEPS, options=options, PYTHON=str(python))
    wait_for(lambda: jobs.cluster.job(number)["Restarts"] == "1", 180)
    jobs.cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert_like_undisturbed(jobs, "short")


def test_a_preempted_job_comes_back(jobs, emoji, undisturbed):
    number = jobs.pretrain(emoji, "preempted", STEPS)
    wait_for(lambda: steps_done(jobs, "preempted") >= 3, 120)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    jobs.cluster.call("sbatch", *urgent)
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert jobs.cluster.job(number)["Restarts"] == "1"
    assert_like_undisturbed(jobs, "preempted")


def test_a_job_whose_node_dies_comes_back(jobs, emoji, undisturbed):
    # Without the pretended GPUs: Slurm 22.05 loses those of a job that is completing when its node is taken for dead.
    options = ("--gpus-per-node=0",)
    number = jobs.pretrain(emoji, "crashed", STEPS, "--checkpoint.every_steps=5", options=options, SLURM_WAIT="5")
    wait_for(lambda: steps_done(jobs, "crashed") >= 8, 120)
    jobs.cluster.crash_node("n2")
    wait_for(lambda: jobs.cluster.job(number)["Restarts"] == "1", 120)
    assert "does not answer; requeueing the job" in jobs.log(number)
    # Slurm takes the node for dead only now. One that answers before that would be told to end what it does not run.
    wait_for(lambda: "down" in jobs.cluster.call("sinfo", "-hN", "-p", "main", "-n", "n2", "-o", "%T"), 120)
    jobs.cluster.start_node("n2")
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert_like_undisturbed(jobs, "crashed")


def test_a_cancelled_job_stays_cancelled_and_has_saved(jobs, emoji):
    number = jobs.pretrain(emoji, "cancelled", STEPS)
    wait_for(lambda: steps_done(jobs, "cancelled") >= 3, 120)
    jobs.cluster.call("scancel", number)
    assert jobs.end(number) == "CANCELLED", jobs.log(number)
    wait_for(lambda: "saved; the same command resumes" in jobs.log(number), 20)
    assert (jobs.root / "cancelled/checkpoints/latest").exists()


def test_one_task_a_node_starts_its_ranks_through_torchrun(jobs, emoji):
    flags = ("--data.global_batch_size=128",)
    number = jobs.pretrain(emoji, "torchrun", 12, *flags, RANKS_PER_NODE="2")
    wait_for(lambda: steps_done(jobs, "torchrun") >= 2, 180)
    jobs.cluster.call("scancel", "--signal=USR1", number)
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert jobs.cluster.job(number)["Restarts"] == "1"
    of_ranks = jobs.rank_logs(number)
    assert list(of_ranks) == [f"rank{rank:05d}.log" for rank in range(4)]
    assert "rank 1 on n1" in of_ranks["rank00001.log"] and "rank 2 on n2" in of_ranks["rank00002.log"]
    lines = metrics(jobs.root, "torchrun")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert json.loads((jobs.root / "torchrun/run.json").read_text())["world_size"] == 4


def test_fine_tuning_trains_on_two_nodes_and_is_scored(jobs):
    for split, first, pictures in (("train", 0, 8), ("dev", 50, 3)):
        write_task(jobs.root, "snli_ve", split, pictures, first=first)
    write_pretrained(jobs.root / "pretrained")
    words = [f"--{name}={value}" for name, value in settings("snli_ve", jobs.root, "tuned", 4).items()]
    options = ["--nodes=2", "--ntasks-per-node=1"]
    script = "slurm/finetune_snli_ve.sh"
    number = jobs.submit(options, script, ["tiny_snli_ve", *words], {"RANKS_PER_NODE": "1"})
    assert jobs.end(number) == "COMPLETED", jobs.log(number)
    assert "rank 1 on n2" in jobs.rank_logs(number)["rank00001.log"]
    run = jobs.root / "runs/tuned"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert 0 <= json.loads((run / "eval.json").read_text())["splits"]["dev"]["scores"]["accuracy"] <= 1


def test_wrong_settings_end_the_job_with_the_reason(jobs, emoji):
    number = jobs.pretrain(emoji, "wrong", 3, "--optim.base_lrr=1")
    assert jobs.end(number) == "FAILED"
    assert jobs.cluster.job(number)["ExitCode"] == "2:0" and jobs.cluster.job(number)["Restarts"] == "0"
    assert "base_lrr" in jobs.log(number) and "Traceback" not in jobs.log(number)


def test_an_array_builds_the_shards_of_one_build(jobs, tmp_path):
    words = ["emoji", f"--out={tmp_path / 'array'}"]
    number = jobs.submit(["--array=0-2", "--cpus-per-task=2"], "slurm/build_shards.sh", words)
    wait_for(lambda: not jobs.cluster.call("squeue", "-h", "-j", number), 240)
    run_script("data_prep/build_shards.py", "emoji", f"--out={tmp_path / 'alone'}")
    assert contents(tmp_path / "array") == contents(tmp_path / "alone"), jobs.log(number)


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not Path(name).name.startswith(".")}
