"""Writing eval.json and predictions.json of a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridgetower import dist
from bridgetower.engine.score_file import EVAL_NAME, PREDICTIONS_NAME
from bridgetower.evaluation.scorer import SplitScores
from bridgetower.io.files import write_atomically


def write_scores(
    run_folder: Path, step: int, results: Mapping[str, SplitScores], *, best: Mapping[str, Any] | None = None
) -> None:
    """Write eval.json (the newest scores; the first split's also stand at the top) and predictions.json.

    Does nothing on all ranks but 0.

    Args:
        best: the weights that have scored best so far, for a run that selects weights.
    """
    if dist.rank() != 0 or not results:
        return
    headline = next(iter(results))
    content = {
        "step": step,
        "headline_split": headline,
        **results[headline].scores,
        "splits": {name: {"scores": result.scores, "chance": result.chance} for name, result in results.items()},
        **({"best": best} if best else {}),
    }
    write_atomically(run_folder / EVAL_NAME, json.dumps(content, indent=1).encode() + b"\n")
    samples = {name: result.samples for name, result in results.items()}
    if not any(samples.values()):
        return
    content = {"step": step, "splits": samples}
    write_atomically(run_folder / PREDICTIONS_NAME, json.dumps(content).encode() + b"\n")
