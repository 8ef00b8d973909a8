"""How fast training goes, and how much of it is waiting for data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Batch = TypeVar("Batch")

# The share of a step's time above which its waiting is said, and the reports before it is said again.
_TOLERABLE_WAIT = 0.1
_QUIET_REPORTS = 20

logger = logging.getLogger("bridgetower.throughput")


class Throughput:
    """Measures the time between two reports."""

    def __init__(self) -> None:
        """Start the clock."""
        self._begin()

    def _begin(self) -> None:
        self._start = time.perf_counter()
        self._pairs, self._steps = 0, 0
        self._wait_seconds, self._paused_seconds = 0.0, 0.0

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
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside: evaluation, a checkpoint."""
        before = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - before

    def step_done(self, pairs: int) -> None:
        """Count one optimiser step."""
        self._pairs += pairs
        self._steps += 1

    def report(self, world_size: int) -> dict[str, float]:
        """Figures since the last report, and begin anew. Call it when the device has finished its work."""
        seconds = max(time.perf_counter() - self._start - self._paused_seconds, 1e-9)
        figures = {
            "speed/pairs_per_second": self._pairs / seconds,
            "speed/pairs_per_second_per_rank": self._pairs / seconds / world_size,
            "speed/step_seconds": seconds / max(self._steps, 1),
            "data/wait_fraction": self._wait_seconds / seconds,
        }
        self._begin()
        return figures


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
