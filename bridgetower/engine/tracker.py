"""Where metrics go: always to ``metrics.jsonl``, as a line to the terminal or log, and to W&B on request."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

from bridgetower import dist
from bridgetower.engine.metrics_file import METRICS_NAME, drop_after
from bridgetower.engine.wandb_mirror import Mirror

logger = logging.getLogger(__name__)

# Least columns of a terminal whose live line has a bar, and the loss of each objective.
_BAR_COLUMNS, _OBJECTIVES_COLUMNS = 100, 130


class Means:
    """Sums (sum, count) metrics on the device, without reading them."""

    def __init__(self) -> None:
        """Start empty."""
        self._totals: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one micro-step."""
        for name, value in metrics.items():
            self._totals[name] = self._totals[name] + value if name in self._totals else value.clone()

    def take(self) -> dict[str, float]:
        """Compute the means over all ranks and micro-steps since the last call.

        All ranks must call it. It waits for them and for the device.
        """
        names = sorted(self._totals)
        if not names:
            return {}
        totals = dist.sum_over_ranks(torch.stack([self._totals[name] for name in names])).tolist()
        self._totals = {}
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}


class Tracker:
    """Writes metrics on rank 0; does nothing on other ranks."""

    def __init__(
        self,
        run_folder: Path,
        *,
        total_steps: int,
        first_step: int,
        wandb_mode: Literal["off", "auto", "online", "offline"],
        wandb_project: str,
        wandb_entity: str,
        run_config: dict[str, Any],
    ) -> None:
        """Open the outputs.

        Args:
            first_step: steps done before. Metrics of later steps are dropped: the run was resumed from before them.
            run_config: shown with the run in W&B.

        Raises:
            ConfigError: wandb_mode is online, and there is no key.
        """
        self._total_steps = total_steps
        self._path = run_folder / METRICS_NAME
        self._file = self._mirror = self._progress = None
        if dist.rank() != 0:
            return
        drop_after(self._path, first_step)
        self._file = self._path.open("a")
        if wandb_mode != "off":
            self._mirror = Mirror(
                run_folder,
                self._path,
                mode=wandb_mode,
                project=wandb_project,
                entity=wandb_entity,
                run_config=run_config,
            )
        if sys.stderr.isatty():
            console, column = Console(stderr=True), Column(no_wrap=True)
            bar = [BarColumn(bar_width=None, table_column=Column(ratio=1))] if console.width >= _BAR_COLUMNS else []
            self._progress = Progress(
                TextColumn("[bold]{task.description}", table_column=column),
                *bar,
                MofNCompleteColumn(table_column=column),
                TextColumn("{task.fields[figures]}", table_column=column),
                console=console,
                expand=bool(bar),
            )
            self._task = self._progress.add_task(run_folder.name, total=total_steps, completed=first_step, figures="")
            self._progress.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, if there are any."""
        if self._file is None or not metrics:
            return
        self._file.write(json.dumps({"step": step, **{name: _round(value) for name, value in metrics.items()}}) + "\n")
        self._file.flush()
        if "train/loss/total" in metrics:
            left = f"  {_format_time(metrics['progress/eta_hours'])} left" if step < self._total_steps else ""
            if self._progress is not None:
                width = self._progress.console.width
                figures = f"{_format_figures(metrics, has_objectives=width >= _OBJECTIVES_COLUMNS)}{left}"
                if width < _BAR_COLUMNS:
                    figures = figures.replace("  ", " ")
                self._progress.update(self._task, completed=step, figures=figures)
            else:
                figures = _format_figures(metrics, has_objectives=True)
                logger.info("step %d/%d  %s%s", step, self._total_steps, figures, left)

    def show_step(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def _format_figures(metrics: dict[str, float], *, has_objectives: bool) -> str:
    objectives = "  ".join(
        f"{name.removeprefix('train/loss/')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("train/loss/") and name != "train/loss/total"
    )
    losses = f"loss {metrics['train/loss/total']:.3f}" + (f" ({objectives})" if has_objectives else "")
    utilisation = f"  MFU {metrics['speed/mfu']:.0%}" if "speed/mfu" in metrics else ""
    speed = f"{metrics['speed/pairs_per_second']:.0f} pairs/s{utilisation}"
    waits = f"{'waits for data' if has_objectives else 'waits'} {metrics['data/wait_fraction']:.0%}"
    return f"{losses}  {speed}  {waits}"


def _format_time(hours: float) -> str:
    """Write a duration as 2 d 7 h, 5 h 12 min, 3 min or 40 s."""
    seconds = round(hours * 3600)
    days, minutes = seconds // 86400, seconds // 60
    if days:
        return f"{days} d {seconds % 86400 // 3600} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds} s"


def _round(value: float) -> float:
    """Round to 7 significant digits."""
    return float(f"{value:.7g}")
