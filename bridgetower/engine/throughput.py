"""How fast training runs, and how much of its time is spent waiting for data."""

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

# Waiting is reported above this fraction of a step's time, and then not again for this many reports.
_TOLERABLE_WAIT_FRACTION = 0.1
_QUIET_REPORTS = 20

logger = logging.getLogger("bridgetower.throughput")


@dataclass(frozen=True, kw_only=True)
class ReferenceSpeed:
    """What the measured speed is compared with."""

    flops_per_pair: Callable[[float], float]
    """Operations per pair for a mean length of the captions, in tokens."""
    peak_flops: float | None
    """Operations per second of one device; None if unknown."""


class Throughput:
    """Measures the time between two reports."""

    def __init__(self, reference_speed: ReferenceSpeed | None = None) -> None:
        """Start the clock."""
        self._reference_speed = reference_speed
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._pairs, self._steps = 0, 0
        self._wait_seconds = 0.0
        self._pauses: dict[str, float] = {}

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through, and measure the time that it takes to get them."""
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_seconds += time.perf_counter() - before
            yield batch

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Leave the time inside this context out of the speed, and report it as a pause.

        Args:
            reason: evaluation or checkpoint.
        """
        before = time.perf_counter()
        yield
        self._pauses[reason] = self._pauses.get(reason, 0.0) + time.perf_counter() - before

    def count_step(self, pairs: int) -> None:
        """Count one optimizer step."""
        self._pairs += pairs
        self._steps += 1

    def report(self, world_size: int, tokens_per_pair: float) -> dict[str, float]:
        """Compute the figures since the last report, and start anew.

        Call it when the device has finished its work, on all ranks, which wait for each other: a single rank that waits
        for data holds up all of them.
        """
        seconds = max(time.perf_counter() - self._start - sum(self._pauses.values()), 1e-9)
        wait_fractions = [float(fraction) for fraction in dist.gather_objects(self._wait_seconds / seconds)]
        pairs_per_second_per_rank = self._pairs / seconds / world_size
        figures = {
            "speed/pairs_per_second": self._pairs / seconds,
            "speed/pairs_per_second_per_rank": pairs_per_second_per_rank,
            "speed/step_seconds": seconds / max(self._steps, 1),
            "data/wait_fraction": sum(wait_fractions) / len(wait_fractions),
            "data/wait_fraction_of_slowest": max(wait_fractions),
            **{f"{reason}/pause_seconds": pause_seconds for reason, pause_seconds in self._pauses.items()},
        }
        if self._reference_speed is not None:
            flops = self._reference_speed.flops_per_pair(tokens_per_pair) * pairs_per_second_per_rank
            figures["speed/tflops_per_rank"] = flops / 1e12
            if self._reference_speed.peak_flops:
                figures["speed/mfu"] = flops / self._reference_speed.peak_flops
        self._restart()
        return figures


def host_memory_bytes() -> int:
    """Read the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_memory(device: torch.device) -> dict[str, float]:
    """Measure the memory, in GB, of the rank that uses most. All ranks must call it.

    A GPU's peak counts from the last call on.
    """
    figures = {"memory/host_gb": host_memory_bytes() / 1e9}
    if device.type == "cuda":
        figures["memory/device_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        figures["memory/device_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    figures_of_ranks: list[dict[str, float]] = dist.gather_objects(figures)
    return {name: max(rank_figures[name] for rank_figures in figures_of_ranks) for name in figures}


class DataAdvice:
    """Logs one line when the loader is the bottleneck, with what to do about it, and then stays quiet for a while."""

    def __init__(self, suggestion: str) -> None:
        """Start quiet: in the first report the loader's workers are still starting.

        Args:
            suggestion: a sentence for the line; empty: never log one.
        """
        self._suggestion, self._quiet_reports = suggestion, 1

    def check(self, wait_fraction: float) -> None:
        """Check the wait of one report, as a fraction of its time."""
        self._quiet_reports -= 1
        if wait_fraction > _TOLERABLE_WAIT_FRACTION and self._quiet_reports < 0 and self._suggestion:
            logger.info(
                "data is the bottleneck: steps wait for it %.0f%% of their time. %s",
                100 * wait_fraction,
                self._suggestion,
            )
            self._quiet_reports = _QUIET_REPORTS
