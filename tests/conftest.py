"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo corpus, built as `make demo` does: folders train, combination and concept."""
    out = tmp_path_factory.mktemp("shards") / "emoji"
    run_script("data_prep/build_shards.py", "emoji", f"--out={out}")
    return out


@pytest.fixture
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For a test that needs several GB: no two of them run at a time, on any worker of pytest."""
    with (tmp_path_factory.getbasetemp().parent / "much_memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_script(
    script: str,
    *arguments: str,
    ranks: int = 0,
    code: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path = REPO,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run an entry script as a user does, and check its exit code.

    Args:
        ranks: 0 with plain python, otherwise under the deepspeed launcher.
    """
    result = subprocess.run(
        command_line(script, arguments, ranks),
        cwd=cwd,
        env=script_environment(env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert result.returncode == code, f"exit {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}"
    return result


def command_line(script: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """The words of a command."""
    path = str(REPO / script)
    if not ranks:
        return [sys.executable, path, *arguments]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), path, *arguments]


def script_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a test's command: one thread, no dashboard, nothing of a launcher around pytest."""
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    return {**inherited, **own, "COLUMNS": "160", **extra}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
