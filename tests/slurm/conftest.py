"""The cluster of these tests. `make test-slurm` runs them; `make test` does not, because they install packages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, preloaded_words, run_script
from tests.integration.runs import SMALL_MODEL
from tests.slurm.cluster import Cluster, wait_for

# One thread per rank, for two ranks on two cores. A job inherits the environment of sbatch.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of two nodes."""
    running = Cluster()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """Build the demo corpus."""
    out = tmp_path_factory.mktemp("shards") / "emoji"
    run_script("data_prep/build_shards.py", "emoji", f"--out={out}")
    return out


class Jobs:
    """Submits jobs from the root of the repository, as users do, and reads their logs."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        """Write logs and runs into `root`."""
        self.cluster, self.root = cluster, root
        self.python = root / "python"
        """Runs scripts on a server that has imported what they need, and everything else with Python itself."""
        preloaded = shlex.join([sys.executable, *preloaded_words()])
        self.python.write_text(f'#!/bin/sh\ncase $1 in -*) exec {sys.executable} "$@" ;; esac\nexec {preloaded} "$@"\n')
        self.python.chmod(0o755)

    def submit(self, options: list[str], script: str, words: list[str], env: dict[str, str] | None = None) -> str:
        """Submit a script. Returns: the job id."""
        name = f"job{len(list(self.root.glob('*.out')))}"
        settings = {**ONE_THREAD, "PYTHON": str(self.python), "RANK_LOGS": str(self.root / name), **(env or {})}
        (self.root / f"{name}.out").touch()
        command = ["sbatch", "--parsable", f"--output={self.root / name}.out", *options, script, *words]
        job_id = self.cluster.call("env", "-C", str(REPO), *(f"{k}={v}" for k, v in settings.items()), *command)
        self.names = {**getattr(self, "names", {}), job_id: name}
        return job_id

    def pretrain(
        self, shards: Path, run: str, steps: int, *words: str, options: tuple[str, ...] = (), **env: str
    ) -> str:
        """Submit slurm/pretrain_base.sh with a small model, by default one rank on each of two nodes."""
        settings = [
            "tiny",
            f"--run_root={self.root}",
            f"--name={run}",
            f"--data.train_shards={shards / 'train'}",
            "--data.eval_shards=",
            "--data.global_batch_size=64",
            "--data.micro_batch_size=32",
            f"--optim.total_steps={steps}",
            "--checkpoint.every_steps=1000",
            "--evaluation.every_steps=0",
            "--tracker.every_steps=1",
            "--engine.threads_per_rank=1",
            *SMALL_MODEL,
            *words,
        ]
        nodes = ["--nodes=2", "--ntasks-per-node=1", *options]
        return self.submit(nodes, "slurm/pretrain_base.sh", settings, {"RANKS_PER_NODE": "1", **env})

    def state(self, job_id: str) -> str:
        """Read the state: PENDING, RUNNING, COMPLETED, ..."""
        return self.cluster.show_job(job_id)["JobState"]

    def end(self, job_id: str, seconds: float = 240) -> str:
        """Wait until a job has ended. Returns: its state."""
        try:
            wait_for(lambda: self.state(job_id) in ENDED, seconds)
        except TimeoutError:
            raise AssertionError(f"{self.cluster.show_job(job_id)}\n{self.log(job_id)}") from None
        return self.state(job_id)

    def log(self, job_id: str) -> str:
        """Read the merged log."""
        return (self.root / f"{self.names[job_id]}.out").read_text()

    def rank_logs(self, job_id: str) -> dict[str, str]:
        """Read the logs of the ranks, by file name."""
        return {path.name: path.read_text() for path in sorted((self.root / self.names[job_id]).glob("*.log"))}


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory) -> Jobs:
    """Submit the jobs of all tests into one folder, because their runs are compared with each other."""
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))
