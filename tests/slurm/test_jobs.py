"""The job scripts on a real Slurm: two nodes train together, and a job resumes after every way to interrupt it."""

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


def count_steps(jobs, run: str) -> int:
    path = jobs.root / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="session")
def undisturbed(jobs, emoji) -> str:
    """Train the run `undisturbed` on two nodes. Returns: the job id."""
    job_id = jobs.pretrain(emoji, "undisturbed", STEPS, PYTHON=sys.executable)
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    return job_id


def test_two_nodes_train_together(jobs, undisturbed):
    log, rank_logs = jobs.log(undisturbed), jobs.rank_logs(undisturbed)
    assert list(rank_logs) == ["rank00000.log", "rank00001.log"]
    assert "rank 0 on n1, restart 0" in rank_logs["rank00000.log"]
    assert "rank 1 on n2, restart 0" in rank_logs["rank00001.log"]
    # The merged log has both ranks, labelled by task.
    assert "0: rank 0 on n1" in log and "1: rank 1 on n2" in log
    assert f"step {STEPS}/{STEPS}" in log and f"step {STEPS}/{STEPS}" in rank_logs["rank00000.log"]
    assert jobs.cluster.show_job(undisturbed)["NodeList"] == "n[1-2]"


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
    """Compare every loss of every step, and every weight, bit for bit."""
    assert metrics(jobs.root, run) == metrics(jobs.root, "undisturbed")
    resumed, expected = weights(jobs.root, run), weights(jobs.root, "undisturbed")
    assert resumed.keys() == expected.keys() and all(bool((resumed[name] == expected[name]).all()) for name in resumed)


def test_a_requeued_and_then_signalled_job_ends_like_an_undisturbed_one(jobs, emoji, undisturbed):
    job_id = jobs.pretrain(emoji, "disturbed", STEPS)
    wait_for(lambda: count_steps(jobs, "disturbed") >= 5, 120)
    jobs.cluster.call("scontrol", "requeue", job_id)
    wait_for(lambda: "restart 1" in jobs.log(job_id) and "resuming from" in jobs.log(job_id), 120)
    after = count_steps(jobs, "disturbed")
    assert 5 <= after < STEPS, "the job ended before it was requeued: give it more steps"
    wait_for(lambda: count_steps(jobs, "disturbed") >= after + 5, 120)
    jobs.cluster.call("scancel", "--signal=USR1", job_id)
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert jobs.cluster.show_job(job_id)["Restarts"] == "2"
    assert "stopped with a checkpoint; requeueing the job" in jobs.log(job_id)
    assert "rank 1 on n2, restart 2" in jobs.rank_logs(job_id)["rank00001.log"]
    assert_like_undisturbed(jobs, "disturbed")


def test_a_job_at_its_time_limit_resumes_in_the_next(jobs, emoji, undisturbed):
    # The signal comes within half a minute, before the trainer is up, and is repeated until the trainer handles it.
    python = jobs.root / "slow_python"
    first = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ]'
    python.write_text(f'#!/bin/sh\ncase $1 in -*) ;; *) {first} && sleep 45 ;; esac\nexec {jobs.python} "$@"\n')
    python.chmod(0o755)
    options = ("--time=4", "--signal=B:USR1@235")
    job_id = jobs.pretrain(emoji, "short", STEPS, options=options, PYTHON=str(python))
    wait_for(lambda: jobs.cluster.show_job(job_id)["Restarts"] == "1", 180)
    jobs.cluster.call("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert_like_undisturbed(jobs, "short")


def test_a_preempted_job_comes_back(jobs, emoji, undisturbed):
    job_id = jobs.pretrain(emoji, "preempted", STEPS)
    wait_for(lambda: count_steps(jobs, "preempted") >= 3, 120)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    jobs.cluster.call("sbatch", *urgent)
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert jobs.cluster.show_job(job_id)["Restarts"] == "1"
    assert_like_undisturbed(jobs, "preempted")


def test_a_job_whose_node_dies_comes_back(jobs, emoji, undisturbed):
    # Without the fake GPUs: Slurm 22.05 loses those of a job that is completing when its node is declared dead.
    options = ("--gpus-per-node=0",)
    job_id = jobs.pretrain(emoji, "crashed", STEPS, "--checkpoint.every_steps=5", options=options, SLURM_WAIT="5")
    wait_for(lambda: count_steps(jobs, "crashed") >= 8, 120)
    jobs.cluster.crash_node("n2")
    wait_for(lambda: jobs.cluster.show_job(job_id)["Restarts"] == "1", 120)
    assert "does not answer; requeueing the job" in jobs.log(job_id)
    # Slurm declares the node dead only now. Started before that, it would be told to end a job that it does not run.
    wait_for(lambda: "down" in jobs.cluster.call("sinfo", "-hN", "-p", "main", "-n", "n2", "-o", "%T"), 120)
    jobs.cluster.start_node("n2")
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert_like_undisturbed(jobs, "crashed")


def test_a_cancelled_job_stays_cancelled_and_has_saved(jobs, emoji):
    job_id = jobs.pretrain(emoji, "cancelled", STEPS)
    wait_for(lambda: count_steps(jobs, "cancelled") >= 3, 120)
    jobs.cluster.call("scancel", job_id)
    assert jobs.end(job_id) == "CANCELLED", jobs.log(job_id)
    wait_for(lambda: "saved; the same command resumes" in jobs.log(job_id), 20)
    assert (jobs.root / "cancelled/checkpoints/latest").exists()


def test_one_task_per_node_starts_its_ranks_through_torchrun(jobs, emoji):
    flags = ("--data.global_batch_size=128",)
    job_id = jobs.pretrain(emoji, "torchrun", 12, *flags, RANKS_PER_NODE="2")
    wait_for(lambda: count_steps(jobs, "torchrun") >= 2, 180)
    jobs.cluster.call("scancel", "--signal=USR1", job_id)
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert jobs.cluster.show_job(job_id)["Restarts"] == "1"
    rank_logs = jobs.rank_logs(job_id)
    assert list(rank_logs) == [f"rank{rank:05d}.log" for rank in range(4)]
    assert "rank 1 on n1" in rank_logs["rank00001.log"] and "rank 2 on n2" in rank_logs["rank00002.log"]
    lines = metrics(jobs.root, "torchrun")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert json.loads((jobs.root / "torchrun/run.json").read_text())["world_size"] == 4


def test_fine_tuning_trains_on_two_nodes_and_is_scored(jobs):
    for split, first, num_images in (("train", 0, 8), ("dev", 50, 3)):
        write_task(jobs.root, "snli_ve", split, num_images, first=first)
    write_pretrained(jobs.root / "pretrained")
    words = [f"--{name}={value}" for name, value in settings("snli_ve", jobs.root, "tuned", 4).items()]
    options = ["--nodes=2", "--ntasks-per-node=1"]
    script = "slurm/finetune_snli_ve.sh"
    job_id = jobs.submit(options, script, ["tiny_snli_ve", *words], {"RANKS_PER_NODE": "1"})
    assert jobs.end(job_id) == "COMPLETED", jobs.log(job_id)
    assert "rank 1 on n2" in jobs.rank_logs(job_id)["rank00001.log"]
    run = jobs.root / "runs/tuned"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert 0 <= json.loads((run / "eval.json").read_text())["splits"]["dev"]["scores"]["accuracy"] <= 1


def test_wrong_settings_end_the_job_with_the_reason(jobs, emoji):
    job_id = jobs.pretrain(emoji, "wrong", 3, "--optim.base_lrr=1")
    assert jobs.end(job_id) == "FAILED"
    assert jobs.cluster.show_job(job_id)["ExitCode"] == "2:0" and jobs.cluster.show_job(job_id)["Restarts"] == "0"
    assert "base_lrr" in jobs.log(job_id) and "Traceback" not in jobs.log(job_id)


def test_an_array_builds_the_shards_of_one_build(jobs, tmp_path):
    words = ["emoji", f"--out={tmp_path / 'array'}"]
    job_id = jobs.submit(["--array=0-2", "--cpus-per-task=2"], "slurm/build_shards.sh", words)
    wait_for(lambda: not jobs.cluster.call("squeue", "-h", "-j", job_id), 240)
    run_script("data_prep/build_shards.py", "emoji", f"--out={tmp_path / 'alone'}")
    assert read_files(tmp_path / "array") == read_files(tmp_path / "alone"), jobs.log(job_id)


def read_files(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not Path(name).name.startswith(".")}
