"""``eval.json`` and ``predictions.json`` of a run folder: their names, and what a resumed run takes back from them."""

from __future__ import annotations

import json
from pathlib import Path

from bridgetower import dist
from bridgetower.io.files import write_atomically

EVAL_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.json"


def forget_best_after(run_folder: Path, step: int) -> None:
    """Remove the best weights from eval.json if they belong to a later step: the run resumes from before it."""
    path = run_folder / EVAL_NAME
    if dist.rank() != 0 or not path.is_file():
        return
    content = json.loads(path.read_bytes())
    if content.get("best", {"step": step})["step"] > step:
        del content["best"]
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
