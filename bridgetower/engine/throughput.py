"""How fast training goes, and how much of it is waiting for data."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bridgetower import dist

Batch = TypeVar("Batch")

# The share of a step's time above which its waiting is said, and the reports before it is said again.
_TOLERABLE_WAIT = 0.1
_QUIET_REPORTS = 20

logger = logging.getLogger("bridgetower.throughput")


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What speed is compared with."""

    flops_of_pair: Callable[[float], float]
    """Operations of a pair, by the mean length of the captions."""
    peak_flops: float | None
    """Of a device."""


class Throughput:
    """Measures the time between two reports."""

    def __init__(self, yardstick: Yardstick | None = None) -> None:
        """Start the clock."""
        self._yardstick = yardstick
        self._begin()

    def _begin(self) -> None:
        self._start = time.perf_counter()
        self._pairs, self._steps = 0, 0
        self._wait_seconds = 0.0
        self._pauses: dict[str, float] = {}

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through and count the time it takes to get them."""
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_seconds += time.perf_counter() - before
            yield batch

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Do not count what happens inside, but report how long it took.

        Args:
            reason: evaluation or checkpoint.
        """
        before = time.perf_counter()
        yield
        self._pauses[reason] = self._pauses.get(reason, 0.0) + time.perf_counter() - before

    def step_done(self, pairs: int) -> None:
        """Count one optimiser step."""
        self._pairs += pairs
        self._steps += 1

    def report(self, world_size: int, tokens_per_pair: float) -> dict[str, float]:
        """Figures since the last report, and begin anew. Call it when the device has finished its work.

        Called on all ranks, which wait for each other: a rank that waits for data holds up all, whichever it is.
        """
        seconds = max(time.perf_counter() - self._start - sum(self._pauses.values()), 1e-9)
        waits = [float(share) for share in dist.gather_objects(self._wait_seconds / seconds)]
        per_rank = self._pairs / seconds / world_size
        figures = {
            "speed/pairs_per_second": self._pairs / seconds,
            "speed/pairs_per_second_per_rank": per_rank,
            "speed/step_seconds": seconds / max(self._steps, 1),
            "data/wait_fraction": sum(waits) / len(waits),
            "data/wait_fraction_of_slowest": max(waits),
            **{f"{reason}/pause_seconds": paused for reason, paused in self._pauses.items()},
        }
        if self._yardstick is not None:
            flops = self._yardstick.flops_of_pair(tokens_per_pair) * per_rank
            figures["speed/tflops_per_rank"] = flops / 1e12
            if self._yardstick.peak_flops:
                figures["speed/mfu"] = flops / self._yardstick.peak_flops
        self._begin()
        return figures


def host_memory_bytes() -> int:
    """Read the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_figures(device: torch.device) -> dict[str, float]:
    """Memory of the rank that has most of it in use, GB, since the last call; called on all ranks."""
    own = {"memory/host_gb": host_memory_bytes() / 1e9}
    if device.type == "cuda":
        own["memory/device_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        own["memory/device_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    ranks: list[dict[str, float]] = dist.gather_objects(own)
    return {name: max(one[name] for one in ranks) for name in own}


class DataAdvice:
    """Says in a line that the loader is the bottleneck, and what to do; not again at once."""

    def __init__(self, cure: str) -> None:
        """Prepare.

        Args:
            cure: a sentence; empty: never say anything.
        """
        self._cure, self._quiet = cure, 1  # the first report has the workers' start in it

    def heed(self, wait_fraction: float) -> None:
        """Look at a report."""
        self._quiet -= 1
        if wait_fraction > _TOLERABLE_WAIT and self._quiet < 0 and self._cure:
            logger.info(
                "data is the bottleneck: steps wait for it %.0f%% of their time. %s", 100 * wait_fraction, self._cure
            )
            self._quiet = _QUIET_REPORTS
