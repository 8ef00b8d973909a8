"""``metrics.jsonl`` of a run folder: one line of JSON per logged step."""

from __future__ import annotations

import json
from pathlib import Path

from bridgetower.io.files import write_atomically

METRICS_NAME = "metrics.jsonl"


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """Read the lines of ``metrics.jsonl``, without a last line that is still being written."""
    lines = []
    path = run_folder / METRICS_NAME
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
