"""Held-out scores as a table for the terminal, each beside what guessing gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from bridgetower.evaluation.pretraining import RECALL_AT, SplitScores

LABELS: dict[str, str] = {
    "itm_balanced_accuracy": "ITM balanced accuracy (random negatives)",
    **{f"t2i_r{k}": f"text-to-image R@{k}, with ITM" for k in RECALL_AT},
    **{f"i2t_r{k}": f"image-to-text R@{k}, with ITM" for k in RECALL_AT},
    **{f"itc_t2i_r{k}": f"text-to-image R@{k}, by ITC alone" for k in RECALL_AT},
    **{f"itc_i2t_r{k}": f"image-to-text R@{k}, by ITC alone" for k in RECALL_AT},
    "mlm_accuracy": "MLM accuracy of masked words",
    "mlm_loss": "MLM loss (nats a token)",
    # Of fine-tuning.
    "vqa_score": "VQA score",
    "accuracy": "accuracy",
    "r_mean": "mean of the six recalls, with ITM",
    "loss": "loss (nats a pair)",
}
"""The scores in the order in which they are shown, by their names in eval.json."""


def format_score(name: str, value: float) -> str:
    """Fractions in percent, losses as they are."""
    return f"{value:.3f}" if name.endswith("loss") else f"{100 * value:.1f}%"


def print_scores(step: int, results: Mapping[str, SplitScores]) -> None:
    """Print one column per split, and what guessing gives in brackets."""
    table = Table("score", title=f"Held-out scores after step {step} (in brackets: guessing)", title_justify="left")
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
