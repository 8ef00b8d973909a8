"""What benchmarks/gpu/measure.py measures, in which order, and how its minutes are shared out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bridgetower.config.compute import ComputeConfig

EVERYTHING = ("vision", "text", "fusion")
"""Every part that compute.recompute knows."""
FUSION = ("fusion",)
_PUBLISHED_BATCH = 4_096  # pairs of a step (arXiv 2206.08657, section 4.1)


class Run(NamedTuple):
    """One way to compute the step."""

    micro_batch: int
    recompute: tuple[str, ...] = ()
    compiled: bool = False
    recorded: bool = True
    """As CUDA graphs, where nothing is recomputed or compiled."""
    accumulation_steps: int = 1
    """Micro-batches of a training run's step."""

    @property
    def compute(self) -> ComputeConfig:
        """The step's settings, but for compiling, which is for good."""
        return ComputeConfig(recompute=self.recompute, cuda_graphs=self.recorded and not self.compiled)

    def describe(self) -> str:
        """For people."""
        if self.recompute:
            return f"eager, recomputes {','.join(self.recompute)}"
        return "compiled" if self.compiled else "recorded" if self.recorded else "eager"


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
    num_pairs: int = 0
    """Of the training run, about."""

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
    """What it is thought to take on an H100. It is not begun where less is left."""
    measure: str
    options: Callable[[Results], dict[str, Any]]
    """The other fields of its request, which may depend on what was found before."""


class _Shapes(NamedTuple):
    """Models, and the micro-batches that are tried."""

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
    """All sections; what matters most comes first, as the last ones are those that time may run out for.

    What they take where the host is fast adds up to 461 s, so that all of them fit into a call of eight minutes.
    """
    shapes = _SMALL if small else _Shapes()
    base, large = (_Model(shapes, number) for number in (0, 1))
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
    # The sections of large would do the same once more; the others take a CPU about as long each.
    return [section._replace(seconds=10.0) for section in sections if not section.name.endswith("_large")]


class _Model:
    """The sections' options for one of the two models."""

    def __init__(self, shapes: _Shapes, number: int) -> None:
        self._shapes, self._number = shapes, number
        self._size = ("base", "large")[number]
        self._name = shapes.models[number]

    def _best(self, results: Results) -> list[int]:
        """Micro-batches, the fastest first; where nothing was measured, the smallest first, as it fits."""
        found = fastest(results, f"steps_{self._size}")
        return [row["micro_batch"] for row in found] or sorted(self._shapes.sweep[self._number])

    def steps(self, results: Results) -> dict[str, Any]:
        """Micro-batches, the smallest also kernel by kernel; then larger ones with layers recomputed, all or some."""
        shapes, number = self._shapes, self._number
        recomputed = (
            Run(shapes.recompute_everything[number], EVERYTHING),
            Run(shapes.recompute_fusion[number], FUSION),
        )
        smallest = shapes.sweep[number][0]
        runs = Run(smallest, recorded=False), *map(Run, shapes.sweep[number]), *recomputed
        return {"model": self._name, "runs": runs}

    def compiled(self, results: Results) -> dict[str, Any]:
        """At the micro-batch that was the fastest: images of another would be compiled anew."""
        return {"model": self._name, "runs": (Run(self._best(results)[0], compiled=True),)}

    def agreement(self, *, compiled: bool) -> Callable[[Results], dict[str, Any]]:
        run = Run(self._shapes.agreement, compiled=compiled)
        return lambda results: {"model": self._name, "runs": (run,)}

    def sides(self, results: Results) -> dict[str, Any]:
        return {"model": self._name, "runs": (Run(self._shapes.sides),)}

    def engine(self, results: Results) -> dict[str, Any]:
        """With the compiled step where that was faster."""
        run, _ = self._fastest_run(results)
        return {"model": self._name, "runs": (run,), "optimizer": _optimizer(results)}

    def pipeline(self, results: Results) -> dict[str, Any]:
        """A training run at the fastest micro-batch, compiled where that was faster.

        That of base has steps of the published size. A step of large would take a quarter of a minute: it is one
        micro-batch.
        """
        pairs = 0 if self._size == "large" else 8 if self._is_small else _PUBLISHED_BATCH
        run, rate = self._fastest_run(results, pairs)
        return {
            "preset": self._shapes.presets[self._number],
            "runs": (run._replace(accumulation_steps=max(1, pairs // run.micro_batch)),),
            "optimizer": _optimizer(results),
            # Fifteen seconds, in the first of which shapes are recorded.
            "num_pairs": 10 * run.micro_batch if self._is_small else round(15 * rate),
        }

    @property
    def _is_small(self) -> bool:
        return self._shapes is _SMALL

    def _fastest_run(self, results: Results, pairs: int = 0) -> tuple[Run, float]:
        """The run with the most pairs a second, and these.

        Args:
            pairs: of a step that takes whole micro-batches; 0: any.
        """
        found = [*fastest(results, f"steps_{self._size}"), *fastest(results, f"compiled_{self._size}")]
        found = [row for row in found if pairs % row["micro_batch"] == 0]
        fitting = [size for size in self._best(results) if pairs % size == 0] or [1]
        best = max(found, key=_rate, default={"micro_batch": fitting[0], "pairs_per_second": 100.0})
        # Where small shapes are tried, compiling has a section of its own.
        is_compiled = best.get("what") == "compiled" and not self._is_small
        run = Run(int(best["micro_batch"]), compiled=is_compiled, recorded=best.get("what") != "eager")
        return run, _rate(best)


def fastest(results: Results, section: str) -> list[dict[str, Any]]:
    """Rows of a section that have a rate and recompute nothing, the highest rate first."""
    rows = results.get(section, {}).get("rows", ())
    found = [row for row in rows if row.get("pairs_per_second") and "recomputes" not in row["what"]]
    return sorted(found, key=_rate, reverse=True)


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["pairs_per_second"])


def _optimizer(results: Results) -> str:
    """Torch's, once FusedAdam could not be built: the attempt takes a minute."""
    rows = results.get("engine_base", {}).get("rows", ())
    return next((str(row["optimizer"]) for row in rows if "optimizer" in row), "auto")


def seconds_for(section: Section, sections: Sequence[Section], seconds_left: float) -> float:
    """How long a section may take; 0: less is left than it needs.

    That is what it is thought to take and, where there is time to spare, up to twice its share of it.

    Args:
        sections: those that are still to come, this one included.
    """
    if seconds_left < section.seconds:
        return 0.0
    share = seconds_left * section.seconds / sum(other.seconds for other in sections)
    return min(seconds_left, max(section.seconds, 2 * share))
