"""Real processes that are the ranks of one job."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn


def run_on_ranks(function: Callable[[int, Path], None], ranks: int, folder: Path) -> None:
    """Call ``function(rank, folder)`` in as many new processes, joined by gloo; an error in one is raised here."""
    spawn(_as_rank, args=(ranks, function, folder), nprocs=ranks)


def _as_rank(rank: int, ranks: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    function(rank, folder)
    torch.distributed.destroy_process_group()
