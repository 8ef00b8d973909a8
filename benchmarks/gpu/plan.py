"""What benchmarks/gpu/measure.py measures, in which order, and how its minutes are shared out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

EVERYTHING = ("vision", "text", "fusion")
"""Every part that compute.recompute knows."""
# Without this much left a section is not begun.
_LEAST_SECONDS = 5.0


class Run(NamedTuple):
    """One way to compute the step."""

    micro_batch: int
    recompute: tuple[str, ...] = ()
    compiled: bool = False

    def describe(self) -> str:
        """For people."""
        recomputes = f", recomputes {','.join(self.recompute)}" if self.recompute else ""
        return ("compiled" if self.compiled else "eager") + recomputes


class Request(NamedTuple):
    """What a section's process is asked for."""

    measure: str
    """Which function of benchmarks/gpu/sections.py."""
    device: str
    """cuda or cpu."""
    small: bool
    seconds: float
    """After these it is killed."""
    model: str = "base"
    runs: tuple[Run, ...] = ()
    optimizer: Literal["auto", "fused", "torch"] = "auto"
    """As optim.implementation."""
    preset: str = "base_4m"
    num_steps: int = 0
    """Of the training run."""

    def write(self, path: Path) -> None:
        """Write it for the section's process."""
        path.write_text(json.dumps({**self._asdict(), "runs": [run._asdict() for run in self.runs]}))


def read_request(path: Path) -> Request:
    """Read what ``Request.write`` wrote."""
    content = json.loads(path.read_text())
    runs = tuple(Run(**{**run, "recompute": tuple(run["recompute"])}) for run in content.pop("runs"))
    return Request(**content, runs=runs)


Results = Mapping[str, Mapping[str, Any]]
"""Of each section so far, by its name: ``rows``, ``seconds`` and ``error``."""


class Section(NamedTuple):
    """Some measurements that share a process."""

    name: str
    seconds: float
    """What it is thought to take on an H100; the minutes are shared out in this proportion."""
    measure: str
    options: Callable[[Results], dict[str, Any]]
    """The other fields of its request, which may depend on what was found before."""


class _Shapes(NamedTuple):
    """Models, and the micro-batches that are tried."""

    models: tuple[str, str] = ("base", "large")
    sweep: tuple[tuple[int, ...], tuple[int, ...]] = ((16, 32, 64, 128), (8, 16, 32, 64))
    recompute_everything: tuple[tuple[int, ...], tuple[int, ...]] = ((128, 256), (64, 128))
    recompute_fusion: tuple[int, int] = (128, 64)
    num_compiled: int = 2
    agreement: int = 8
    sides: int = 32
    presets: tuple[str, str] = ("base_4m", "large_4m")


# One model of a few layers stands for both, so that every path runs on a CPU in seconds.
_SMALL = _Shapes(
    models=("small", "small"),
    sweep=((2, 4), (2,)),
    recompute_everything=((4,), (2,)),
    recompute_fusion=(4, 2),
    num_compiled=1,
    agreement=4,
    sides=2,
    presets=("tiny", "tiny"),
)


def plan(small: bool) -> list[Section]:
    """All sections; what matters most comes first, as the last ones are those that time may run out for."""
    shapes = _SMALL if small else _Shapes()
    base, large = (_Model(shapes, number) for number in (0, 1))
    return [
        Section("machine", 10, "machine", lambda results: {}),
        Section("agreement", 25, "agreement", base.agreement(compiled=False)),
        Section("eager_base", 35, "steps", base.eager),
        Section("eager_large", 45, "steps", large.eager),
        Section("compiled_base", 80, "steps", base.compiled),
        Section("engine_base", 75, "engine", base.engine),
        Section("pipeline", 90, "pipeline", base.pipeline),
        Section("sides", 35, "sides", base.sides),
        Section("engine_large", 30, "engine", large.engine),
        Section("compiled_large", 80, "steps", large.compiled),
        Section("pipeline_large", 60, "pipeline", large.pipeline),
        Section("recompute_base", 30, "steps", base.recompute),
        Section("recompute_large", 40, "steps", large.recompute),
        Section("agreement_compiled", 50, "agreement", base.agreement(compiled=True)),
    ]


class _Model:
    """The sections' options for one of the two models."""

    def __init__(self, shapes: _Shapes, number: int) -> None:
        self._shapes, self._number = shapes, number
        self._size = ("base", "large")[number]
        self._name = shapes.models[number]

    def _best(self, results: Results) -> list[int]:
        """Micro-batches, the fastest first; where nothing was measured, the smallest first, as it fits."""
        found = fastest(results, f"eager_{self._size}")
        return [row["micro_batch"] for row in found] or sorted(self._shapes.sweep[self._number])

    def eager(self, results: Results) -> dict[str, Any]:
        return {"model": self._name, "runs": tuple(map(Run, self._shapes.sweep[self._number]))}

    def compiled(self, results: Results) -> dict[str, Any]:
        best = self._best(results)[: self._shapes.num_compiled]
        return {"model": self._name, "runs": tuple(Run(size, compiled=True) for size in best)}

    def recompute(self, results: Results) -> dict[str, Any]:
        runs = [Run(size, EVERYTHING) for size in self._shapes.recompute_everything[self._number]]
        runs.append(Run(self._shapes.recompute_fusion[self._number], ("fusion",)))
        return {"model": self._name, "runs": tuple(runs)}

    def agreement(self, *, compiled: bool) -> Callable[[Results], dict[str, Any]]:
        run = Run(self._shapes.agreement, compiled=compiled)
        return lambda results: {"model": self._name, "runs": (run,)}

    def sides(self, results: Results) -> dict[str, Any]:
        return {"model": self._name, "runs": (Run(self._shapes.sides),)}

    def engine(self, results: Results) -> dict[str, Any]:
        runs = (Run(self._best(results)[0]),)
        return {"model": self._name, "runs": runs, "optimizer": _optimizer(results)}

    def pipeline(self, results: Results) -> dict[str, Any]:
        """The training run, once more with the compiled step where that is faster."""
        eager, compiled = fastest(results, f"eager_{self._size}"), fastest(results, f"compiled_{self._size}")
        size = self._best(results)[0]
        runs = [Run(size)]
        rate = eager[0]["pairs_per_second"] if eager else 100.0
        is_small = self._shapes is _SMALL
        if compiled and compiled[0]["pairs_per_second"] > rate and not is_small:
            runs.append(Run(compiled[0]["micro_batch"], compiled=True))
        return {
            "preset": self._shapes.presets[self._number],
            "runs": tuple(runs),
            "optimizer": _optimizer(results),
            # Twelve seconds of steps.
            "num_steps": 8 if is_small else min(400, max(40, round(12 * rate / size))),
        }


def fastest(results: Results, section: str) -> list[dict[str, Any]]:
    """Rows of a section that have a rate, the highest first."""
    rows = results.get(section, {}).get("rows", ())
    found = [row for row in rows if row.get("pairs_per_second")]
    return sorted(found, key=lambda row: float(row["pairs_per_second"]), reverse=True)


def _optimizer(results: Results) -> str:
    """Torch's, once FusedAdam could not be built: the attempt takes a minute."""
    rows = results.get("engine_base", {}).get("rows", ())
    return next((str(row["optimizer"]) for row in rows if "optimizer" in row), "auto")


def seconds_for(section: Section, sections: Sequence[Section], seconds_left: float) -> float:
    """How long a section may take: twice its share, as most need less than they may take; 0: it is not begun.

    Args:
        sections: those that are still to come, this one included.
    """
    share = seconds_left * section.seconds / sum(other.seconds for other in sections)
    return min(seconds_left, 2 * share) if seconds_left >= _LEAST_SECONDS else 0.0
