"""Runs a function on the ranks of one job, which are real processes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent


def run_on_ranks(function: Callable[[int, Path], None], ranks: int, folder: Path) -> None:
    """Call ``function(rank, folder)`` in ``ranks`` new processes, joined by gloo. An error in one fails the test."""
    from tests.conftest import run_script

    task = folder / "function.pickle"
    task.write_bytes(pickle.dumps((function, folder)))
    run_script("tests/ranks.py", str(task), ranks=ranks, launcher="preloaded")


def _as_rank(function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    function(torch.distributed.get_rank(), folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path[0] = str(REPO)
    _as_rank(*pickle.loads(Path(sys.argv[1]).read_bytes()))
