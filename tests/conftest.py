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

# A shell lets what it starts in the background ignore Ctrl-C, and programs inherit that; tests send it to some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, and with them torch and Triton imported; not in the process that hands them out."""
    hands_out = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if not hands_out:
        # A quarter of the time that it takes to import everything.
        gc.disable()
        import torch

        torch.set_num_threads(1)
        if not torch.cuda.is_available():
            # Before Triton is imported: its kernels are then computed by numpy, operator by operator.
            os.environ.setdefault("TRITON_INTERPRET", "1")


# Whose tests take longest: they are begun first, so that at the end both workers have something to do.
# Between those that need much memory, and so wait for each other, there are some that do not.
SLOWEST_FIRST = ("integration", "test_capacity.py", "benchmarks", "pretrain", "interop")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; needs ``--no-loadscope-reorder`` where pytest-xdist hands them out."""
    places = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(REPO / "tests").parts[0], len(places)))


def pytest_collection_finish() -> None:
    """A million objects of modules live as long as the process: no collection need look at them again.

    And not so often at the others: 700 new ones, Python's own measure, are a layer of a model.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one pytest-xdist share; without them, of this process."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def emoji_shards(of_all_workers: Path) -> Path:
    """The demo corpus, built as `make demo` does: folders train, combination and concept."""
    out = of_all_workers / "shards/emoji"
    with one_at_a_time(of_all_workers / "emoji.lock"):
        if not (out.parent / "complete").exists():
            run_script("data_prep/build_shards.py", "emoji", f"--out={out}")
            (out.parent / "complete").touch()
    return out


@pytest.fixture
def much_memory(of_all_workers: Path) -> Iterator[None]:
    """For a test that needs several GB: no two of them run at a time, on any worker of pytest."""
    with one_at_a_time(of_all_workers / "much_memory.lock"):
        yield


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process holds it."""
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
        ranks: 0 for a program that no launcher starts.
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
    """The words of a command.

    Args:
        launcher: deepspeed; or plain: a new process for each rank, as srun starts them; or preloaded: the same, except
            that it need not import anything. If not given, preloaded for what imports torch.
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
    """What stands between python and a script that need not import anything."""
    return ["-S", preloaded.__file__, preloaded_server().address]


@functools.cache
def preloaded_server() -> preloaded.Server:
    """The one of this process, started when it is first needed; it ends with this process."""
    return preloaded.Server(script_environment({}))


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
