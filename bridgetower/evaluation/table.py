"""Held-out scores as a table for the terminal, each beside its chance level."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bridgetower.evaluation.recall import RECALL_AT

if TYPE_CHECKING:  # its module imports torch, which the labels do not need
    from bridgetower.evaluation.scorer import SplitScores

LABELS: dict[str, str] = {
    "itm_balanced_accuracy": "ITM balanced accuracy (random negatives)",
    **{f"t2i_r{k}": f"text-to-image R@{k}, with ITM" for k in RECALL_AT},
    **{f"i2t_r{k}": f"image-to-text R@{k}, with ITM" for k in RECALL_AT},
    **{f"itc_t2i_r{k}": f"text-to-image R@{k}, ITC only" for k in RECALL_AT},
    **{f"itc_i2t_r{k}": f"image-to-text R@{k}, ITC only" for k in RECALL_AT},
    "mlm_accuracy": "MLM accuracy on masked words",
    "mlm_loss": "MLM loss (nats per token)",
    # Scores of fine-tuning tasks.
    "vqa_score": "VQA score",
    "accuracy": "accuracy",
    "r_mean": "mean of the six recalls, with ITM",
    "loss": "loss (nats per pair)",
}
"""Label of each score, by its name in eval.json, in the order in which scores are shown."""


def format_score(name: str, value: float) -> str:
    """Format a fraction in percent, and a loss as it is."""
    return f"{value:.3f}" if name.endswith("loss") else f"{100 * value:.1f}%"


def print_scores(step: int, results: Mapping[str, SplitScores]) -> None:
    """Print a row per score and a column per split."""
    table = Table("score", title=f"Held-out scores after step {step} (chance level in brackets)", title_justify="left")
    for name in results:
        table.add_column(name, justify="right")
    for name, label in LABELS.items():
        cells = []
        for result in results.values():
            if name not in result.scores:
                continue
            chance = f"  ({format_score(name, result.chance[name])})" if name in result.chance else ""
            cells.append(format_score(name, result.scores[name]) + chance)
        if cells:
            table.add_row(label, *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
