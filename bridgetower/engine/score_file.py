"""``eval.json`` and ``predictions.json`` of a run folder, and what a resumed run takes back in them."""

from __future__ import annotations

import json
from pathlib import Path

from bridgetower.io.files import write_atomically

EVAL_NAME = "eval.json"
"""Scores of the last evaluation, and which weights are the best so far."""
PREDICTIONS_NAME = "predictions.json"
"""Sample predictions of the last evaluation."""


def forget_best_after(run_folder: Path, step: int) -> None:
    """Delete the entry of the best weights from eval.json if they come from a later step than ``step``.

    A run that resumes from before that step has not reached them; it would compare its next scores with them.
    """
    from bridgetower import dist  # it imports torch, which reports do without

    path = run_folder / EVAL_NAME
    if dist.rank() != 0 or not path.is_file():
        return
    content = json.loads(path.read_bytes())
    if content.get("best", {"step": step})["step"] > step:
        del content["best"]
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
