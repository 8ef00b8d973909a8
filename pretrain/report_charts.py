"""The curves of one run or several as inline SVG, whose text stays text."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from bridgetower.evaluation.table import LABELS

Lines = Sequence[Mapping[str, float]]
Points = list[tuple[float, float]]

COLOURS = ("#2563a8", "#c8553d", "#3a8f5d", "#8a5fa8", "#b98a1d", "#4b5563", "#0e8a94", "#b0487f")
# Title, unit of the y axis, metrics, logarithmic y axis. In a metric's name, * stands for one part between slashes; a
# name that ends in / stands for all metrics below it.
_CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Losses", "nats", ("train/loss/",), False),
    ("Training accuracy", "fraction", ("train/accuracy/",), False),
    ("Learning rate", "", ("optim/lr/",), False),
    ("Gradient norm, before clipping", "", ("optim/grad_norm", "optim/grad_norm/"), True),
    ("Losses by corpus", "nats", ("train/corpus/*/loss/",), False),
    ("Training accuracy by corpus", "fraction", ("train/corpus/*/accuracy/",), False),
    ("Speed", "pairs per second", ("speed/pairs_per_second",), False),
    ("Model FLOPs utilisation", "fraction of the peak", ("speed/mfu",), False),
    ("Time spent waiting for data", "fraction", ("data/wait_fraction", "data/wait_fraction_of_slowest"), False),
    ("Memory of the rank that uses most", "GB", ("memory/",), False),
)
_TITLE_CHARACTERS = 50
_HELD_OUT = ("itm_balanced_accuracy", "t2i_r1", "itc_t2i_r1", "mlm_accuracy")


def draw_charts(runs: Mapping[str, Lines]) -> list[str]:
    """Draw a chart for each group of metrics that the runs have.

    For several runs, each metric has a chart of its own, with a curve per run.

    Args:
        runs: lines of ``metrics.jsonl``, by the name of the run.
    """
    names = list(dict.fromkeys(name for lines in runs.values() for line in lines for name in line if name != "step"))
    charts = []
    for title, unit, patterns, is_log in [*_CHARTS, *_held_out_charts(names)]:
        labels = {name: label for pattern in patterns for name in names if (label := _label(name, pattern))}
        if len(runs) == 1:
            [lines] = runs.values()
            panels = [(title, {label: _curve(lines, name) for name, label in labels.items()})]
        else:
            panels = [
                (
                    title if label == _last(name) and len(labels) == 1 else f"{title}: {label.replace('_', ' ')}",
                    {run: curve for run, lines in runs.items() if (curve := _curve(lines, name))},
                )
                for name, label in labels.items()
            ]
        charts += [_draw(heading, unit, curves, list(runs), is_log=is_log) for heading, curves in panels if curves]
    return charts


def _held_out_charts(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...], bool]]:
    splits = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("eval/"))
    return [
        (f"Held-out scores, {split} split", "fraction", tuple(f"eval/{split}/{score}" for score in _HELD_OUT), False)
        for split in splits
    ]


def _label(name: str, pattern: str) -> str:
    """Return the label of a metric's curve: the parts of its name that a pattern leaves open; empty without a match."""
    # An exact name first: the name of a split or corpus is the user's, and a * or a final / in it is not a pattern.
    if name == pattern:
        return LABELS[_last(name)].split(" (")[0] if name.startswith("eval/") else _last(name)
    expression = re.escape(pattern).replace(r"\*", "([^/]+)") + ("(.+)" if pattern.endswith("/") else "")
    match = re.fullmatch(expression, name)
    return " ".join(match.groups()) if match else ""


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _curve(lines: Lines, name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if name in line]


def _draw(title: str, unit: str, curves: Mapping[str, Points], runs: Sequence[str], *, is_log: bool) -> str:
    """Draw one chart; a run has the same colour in all charts."""
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for index, (label, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            colour = runs.index(label) if len(runs) > 1 else index
            axes.plot(
                steps,
                values,
                color=COLOURS[colour % len(COLOURS)],
                linewidth=1.6,
                marker="o" if len(points) < 12 else None,
                markersize=4,
                label=_escape(label if len(runs) > 1 else label.replace("_", " ")),
            )
        axes.set_title(_escape(textwrap.fill(title, _TITLE_CHARACTERS)), fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        if unit:
            axes.set_ylabel(unit)
        if is_log:
            axes.set_yscale("log")
        elif all(value >= 0 for points in curves.values() for _, value in points):
            axes.set_ylim(bottom=0)
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1 or len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    drawing = stream.getvalue()
    return drawing[drawing.index("<svg") :]


def _escape(text: str) -> str:
    """Escape what matplotlib would not show as it is: $ begins a formula, and a leading _ hides a label."""
    escaped = text.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped
