"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import preloaded

REPO = Path(__file__).resolve().parent.parent

# A shell makes its background jobs ignore Ctrl-C, and their child processes inherit that. Some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Set torch and Triton up before the tests are collected, which imports them.

    The process that only distributes tests to pytest-xdist's workers does without torch.
    """
    only_distributes = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if not only_distributes:
        # Collecting garbage would take a quarter of the time of all imports.
        gc.disable()
        import torch

        torch.set_num_threads(1)
        if not torch.cuda.is_available():
            # Triton reads this when it is imported, and then runs its kernels in numpy, operator by operator.
            os.environ.setdefault("TRITON_INTERPRET", "1")


# The folders and files whose tests take longest start first, so that no worker is idle at the end. Between those that
# need much memory, and therefore wait for each other, stand some that do not.
SLOWEST_FIRST = ("integration", "test_capacity.py", "benchmarks", "pretrain", "interop")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the test files. pytest-xdist keeps the order only with ``--no-loadscope-reorder``."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(REPO / "tests").parts[0], len(ranks)))


def pytest_collection_finish() -> None:
    """Exempt the million objects of imported modules from garbage collection, as they live as long as the process.

    Collect the others more rarely, too: Python's default of 700 new objects is one layer of a model.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of pytest-xdist share; without workers, that of this process."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def emoji_shards(of_all_workers: Path) -> Path:
    """The demo corpus, built as `make demo` builds it: folders train, combination and concept."""
    out = of_all_workers / "shards/emoji"
    with one_at_a_time(of_all_workers / "emoji.lock"):
        if not (out.parent / "complete").exists():
            run_script("data_prep/build_shards.py", "emoji", f"--out={out}")
            (out.parent / "complete").touch()
    return out


@pytest.fixture
def much_memory(of_all_workers: Path) -> Iterator[None]:
    """Run tests that need several GB one at a time, over all workers of pytest-xdist."""
    with one_at_a_time(of_all_workers / "much_memory.lock"):
        yield


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock file, after waiting until no other process holds it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_script(
    script: str,
    *arguments: str,
    ranks: int = 0,
    code: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path = REPO,
    timeout_s: float = 300,
    launcher: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run an entry script as a user does, and check its exit code.

    Args:
        ranks: number of processes; 0 runs the program without a launcher.
        code: the expected exit code.
        launcher: see `command_line`.
    """
    result = subprocess.run(
        command_line(script, arguments, ranks, launcher),
        cwd=cwd,
        env=script_environment(env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert result.returncode == code, f"exit {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}"
    return result


def command_line(script: str, arguments: Sequence[str], ranks: int = 0, launcher: str = "") -> list[str]:
    """Compose the command that runs an entry script.

    Args:
        launcher: "deepspeed"; "plain", a new process per rank, as srun starts them; "preloaded", the same with
            processes that tests/preloaded.py forks. By default "preloaded" for the scripts that import torch, else
            "plain".
    """
    path = str(REPO / script)
    if launcher == "deepspeed":
        deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error"]
        return [*deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port()), path, *arguments]
    program = [path, *arguments]
    if (launcher or ("preloaded" if script.startswith(("pretrain/", "finetune/")) else "plain")) == "preloaded":
        program = [*preloaded_words(), *program]
    return [sys.executable, *([str(REPO / "tests/launch_ranks.py"), str(ranks)] if ranks else []), *program]


def preloaded_words() -> list[str]:
    """Return the words between python and a script that have the server of tests/preloaded.py run it."""
    return ["-S", preloaded.__file__, preloaded_server().address]


@functools.cache
def preloaded_server() -> preloaded.Server:
    """Return the server of this process. It starts at the first use and ends with this process."""
    return preloaded.Server(script_environment({}))


def script_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a test's command: one thread, W&B offline, no variable of a launcher around pytest."""
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    return {**inherited, **fixed, "COLUMNS": "160", **extra}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
