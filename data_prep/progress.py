"""Shows the progress of a build: a live display on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from data_prep.build import State

_MAX_REASONS = 6


class ProgressLine:
    """Display of a build; a context manager, since a terminal has to be restored at the end."""

    def __init__(self, title: str, plain_seconds: float) -> None:
        """Prepare the display.

        Args:
            title: what is being built.
            plain_seconds: shortest time between two lines where there is no terminal.
        """
        self._title, self._plain_seconds = title, plain_seconds
        self._console = Console(stderr=True)
        self._start = self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=None, rate="")
        self._live = Live(self._bar, console=self._console, refresh_per_second=4)

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show_rows(self, rows: int) -> None:
        """Show how many rows of the source the plan has read."""
        self._bar.update(self._task, rate=f"{rows:,} rows read")
        self._print(f"{rows:,} rows read")

    def show(self, state: State) -> None:
        """Show what the workers have done."""
        if not state.shards and not state.samples:
            self._start = time.monotonic()  # the rate leaves out the time of planning
        rate = self._format_rate(state)
        reasons = Text(f"  rejected: {_format_reasons(state.rejects)}", style="yellow") if state.rejects else Text("")
        self._bar.update(self._task, completed=state.samples, total=max(state.all_samples, 1), rate=rate)
        self._live.update(Group(self._bar, reasons))
        rejected = f", rejected: {_format_reasons(state.rejects)}" if state.rejects else ""
        self._print(
            f"{state.shards:,} of {state.all_shards:,} shards, {rate}, {self._format_time_left(state)}{rejected}"
        )

    def _format_rate(self, state: State) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{state.images / seconds:,.0f} images/s  {state.bytes / seconds / 1e6:,.1f} MB/s"

    def _format_time_left(self, state: State) -> str:
        if not state.samples:
            return "time left unknown"
        seconds = (time.monotonic() - self._start) * (state.all_samples / state.samples - 1)
        return f"{seconds / 60:,.0f} min left" if seconds > 90 else f"{seconds:,.0f} s left"

    def _print(self, text: str) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= self._plain_seconds:
            self._last = now
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)


def _format_reasons(rejects: Mapping[str, int]) -> str:
    """Format the counts of the most frequent reasons, most frequent first."""
    ordered = sorted(rejects.items(), key=lambda item: (-item[1], item[0]))
    shown = "; ".join(f"{count:,} {reason}" for reason, count in ordered[:_MAX_REASONS])
    return shown if len(ordered) <= _MAX_REASONS else f"{shown}; {len(ordered) - _MAX_REASONS} other reasons"
