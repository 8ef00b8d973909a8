"""The sections of benchmarks/gpu/measure.py, their order, and how much time each gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bridgetower.config.compute import PARTS, ComputeConfig

EVERYTHING = PARTS
"""Recompute every part."""
FUSION = ("fusion",)
_PUBLISHED_BATCH = 4_096  # pairs per step (arXiv 2206.08657, section 4.1)


class Run(NamedTuple):
    """One way to compute the step."""

    micro_batch: int
    recompute: tuple[str, ...] = ()
    compiled: bool = False
    recorded: bool = True
    """Run the step from CUDA graphs, unless it recomputes or is compiled."""
    accumulation_steps: int = 1
    """Micro-batches per step of a training run."""

    @property
    def compute(self) -> ComputeConfig:
        """Settings that a training run would have for this."""
        cuda_graphs = self.recorded and not self.compiled
        return ComputeConfig(recompute=self.recompute, cuda_graphs=cuda_graphs, compile=self.compiled)

    def describe(self) -> str:
        """Return the run's name in tables."""
        if self.recompute:
            return f"eager, recomputes {','.join(self.recompute)}"
        return "compiled" if self.compiled else "recorded" if self.recorded else "eager"


class Request(NamedTuple):
    """What a section's process measures."""

    measure: str
    """Name in MEASURES of benchmarks/gpu/sections.py."""
    device: str
    """cuda or cpu."""
    small: bool
    seconds: float
    """The process is killed after this time."""
    model: str = "base"
    runs: tuple[Run, ...] = ()
    optimizer: Literal["auto", "fused", "torch"] = "auto"
    """Value of optim.implementation."""
    preset: str = "base_4m"
    num_pairs: int = 0
    """Approximate number of pairs of the training run."""

    def write(self, path: Path) -> None:
        """Write the request for the section's process."""
        path.write_text(json.dumps({**self._asdict(), "runs": [run._asdict() for run in self.runs]}))


def read_request(path: Path) -> Request:
    """Return the request that ``Request.write`` wrote."""
    content = json.loads(path.read_text())
    runs = tuple(Run(**{**run, "recompute": tuple(run["recompute"])}) for run in content.pop("runs"))
    return Request(**content, runs=runs)


Results = Mapping[str, Mapping[str, Any]]
"""``rows``, ``seconds`` and ``error`` of each section so far, by its name."""


class Section(NamedTuple):
    """Measurements that share a process."""

    name: str
    seconds: float
    """Expected time on an H100. The section is skipped if less is left."""
    measure: str
    options: Callable[[Results], dict[str, Any]]
    """Returns the other fields of its request, which may depend on earlier results."""


class _Shapes(NamedTuple):
    """Models, and their micro-batch sizes."""

    models: tuple[str, str] = ("base", "large")
    sweep: tuple[tuple[int, ...], tuple[int, ...]] = ((64, 192, 256), (64, 80))
    recompute_everything: tuple[int, int] = (384, 128)
    recompute_fusion: tuple[int, int] = (128, 64)
    agreement: int = 8
    sides: int = 32
    presets: tuple[str, str] = ("base_4m", "large_4m")


# One model of a few layers, so that every path runs on a CPU in seconds.
_SMALL = _Shapes(
    models=("small", "small"),
    sweep=((2, 4), (2,)),
    recompute_everything=(4, 2),
    recompute_fusion=(4, 2),
    agreement=4,
    sides=2,
    presets=("tiny", "tiny"),
)


def plan(small: bool) -> list[Section]:
    """Return all sections, the most important ones first, because time may run out for the last ones.

    With a fast host the sections take 461 s together, so that all of them fit into a call of eight minutes.
    """
    shapes = _SMALL if small else _Shapes()
    base, large = (_Model(shapes, index) for index in (0, 1))
    sections = [
        Section("machine", 12, "machine", lambda results: {}),
        Section("agreement", 28, "agreement", base.agreement(compiled=False)),
        Section("steps_base", 36, "steps", base.steps),
        Section("steps_large", 42, "steps", large.steps),
        Section("compiled_base", 43, "steps", base.compiled),
        Section("engine_base", 55, "engine", base.engine),
        Section("pipeline", 57, "pipeline", base.pipeline),
        Section("pipeline_large", 76, "pipeline", large.pipeline),
        Section("sides", 22, "sides", base.sides),
        Section("engine_large", 27, "engine", large.engine),
        Section("compiled_large", 35, "steps", large.compiled),
        Section("agreement_compiled", 28, "agreement", base.agreement(compiled=True)),
    ]
    if not small:
        return sections
    # With small shapes the sections of large would repeat those of base. The others take a CPU about 10 s each.
    return [section._replace(seconds=10.0) for section in sections if not section.name.endswith("_large")]


class _Model:
    """The options of the sections of one of the two models."""

    def __init__(self, shapes: _Shapes, index: int) -> None:
        self._shapes, self._index = shapes, index
        self._size = ("base", "large")[index]
        self._name = shapes.models[index]

    def _best(self, results: Results) -> list[int]:
        """Return micro-batch sizes, the fastest first; if nothing was measured, the smallest first, because it fits."""
        rows = fastest(results, f"steps_{self._size}")
        return [row["micro_batch"] for row in rows] or sorted(self._shapes.sweep[self._index])

    def steps(self, results: Results) -> dict[str, Any]:
        """Time all micro-batch sizes, the smallest also without CUDA graphs; then larger ones that recompute layers."""
        shapes, index = self._shapes, self._index
        recomputed = (
            Run(shapes.recompute_everything[index], EVERYTHING),
            Run(shapes.recompute_fusion[index], FUSION),
        )
        smallest = shapes.sweep[index][0]
        runs = Run(smallest, recorded=False), *map(Run, shapes.sweep[index]), *recomputed
        return {"model": self._name, "runs": runs}

    def compiled(self, results: Results) -> dict[str, Any]:
        """Time the fastest micro-batch size alone: another number of images would be compiled anew."""
        return {"model": self._name, "runs": (Run(self._best(results)[0], compiled=True),)}

    def agreement(self, *, compiled: bool) -> Callable[[Results], dict[str, Any]]:
        """Check one small micro-batch."""
        run = Run(self._shapes.agreement, compiled=compiled)
        return lambda results: {"model": self._name, "runs": (run,)}

    def sides(self, results: Results) -> dict[str, Any]:
        """Time all sides at one micro-batch size that fits for each."""
        return {"model": self._name, "runs": (Run(self._shapes.sides),)}

    def engine(self, results: Results) -> dict[str, Any]:
        """Time the engine with the fastest step, compiled or not."""
        run, _ = self._fastest_run(results)
        return {"model": self._name, "runs": (run,), "optimizer": _optimizer(results)}

    def pipeline(self, results: Results) -> dict[str, Any]:
        """Time a training run with the fastest step, compiled or not.

        Base trains with the published global batch. Large would take a quarter of a minute per step with it, so its
        global batch is one micro-batch.
        """
        pairs = 0 if self._size == "large" else 8 if self._is_small else _PUBLISHED_BATCH
        run, rate = self._fastest_run(results, pairs)
        return {
            "preset": self._shapes.presets[self._index],
            "runs": (run._replace(accumulation_steps=max(1, pairs // run.micro_batch)),),
            "optimizer": _optimizer(results),
            # Fifteen seconds of training; the first ones record CUDA graphs.
            "num_pairs": 10 * run.micro_batch if self._is_small else round(15 * rate),
        }

    @property
    def _is_small(self) -> bool:
        return self._shapes is _SMALL

    def _fastest_run(self, results: Results, pairs: int = 0) -> tuple[Run, float]:
        """Return the run with the most pairs per second, and that rate.

        Args:
            pairs: global batch size, which the micro-batch must divide; 0: any.
        """
        rows = [*fastest(results, f"steps_{self._size}"), *fastest(results, f"compiled_{self._size}")]
        rows = [row for row in rows if pairs % row["micro_batch"] == 0]
        fitting = [size for size in self._best(results) if pairs % size == 0] or [1]
        best = max(rows, key=_rate, default={"micro_batch": fitting[0], "pairs_per_second": 100.0})
        # With small shapes only the section of compiling compiles.
        is_compiled = best.get("what") == "compiled" and not self._is_small
        run = Run(int(best["micro_batch"]), compiled=is_compiled, recorded=best.get("what") != "eager")
        return run, _rate(best)


def fastest(results: Results, section: str) -> list[dict[str, Any]]:
    """Return the rows of a section that have a rate and recompute nothing, the highest rate first."""
    rows = results.get(section, {}).get("rows", ())
    timed = [row for row in rows if row.get("pairs_per_second") and "recomputes" not in row["what"]]
    return sorted(timed, key=_rate, reverse=True)


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["pairs_per_second"])


def _optimizer(results: Results) -> str:
    """Return ``torch`` once building FusedAdam has failed, because each attempt takes a minute."""
    rows = results.get("engine_base", {}).get("rows", ())
    return next((str(row["optimizer"]) for row in rows if "optimizer" in row), "auto")


def seconds_for(section: Section, sections: Sequence[Section], seconds_left: float) -> float:
    """Return how many seconds a section may take; 0 if less is left than it is expected to take.

    A section may take its expected time or, if that is longer, twice its proportional part of the time left.

    Args:
        sections: the sections that are still to come, this one included.
    """
    if seconds_left < section.seconds:
        return 0.0
    proportional = seconds_left * section.seconds / sum(other.seconds for other in sections)
    return min(seconds_left, max(section.seconds, 2 * proportional))
