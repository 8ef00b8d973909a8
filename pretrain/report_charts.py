"""The curves of one run or several as inline SVG, their text as text."""

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
# Title, unit of the y axis, metrics (a name that ends in / stands for all below it, * for a part), logarithmic y axis.
_CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Losses", "nats", ("train/loss/",), False),
    ("Training accuracy", "share", ("train/accuracy/",), False),
    ("Learning rate", "", ("optim/lr/",), False),
    ("Gradient norm, before clipping", "", ("optim/grad_norm", "optim/grad_norm/"), True),
    ("Losses by corpus", "nats", ("train/corpus/*/loss/",), False),
    ("Training accuracy by corpus", "share", ("train/corpus/*/accuracy/",), False),
    ("Speed", "pairs a second", ("speed/pairs_per_second",), False),
    ("Model FLOPs utilisation", "share of the peak", ("speed/mfu",), False),
    ("Share of time spent waiting for data", "share", ("data/wait_fraction", "data/wait_fraction_of_slowest"), False),
    ("Memory of the rank that uses most", "GB", ("memory/",), False),
)
_TITLE_CHARACTERS = 50
_HELD_OUT = ("itm_balanced_accuracy", "t2i_r1", "itc_t2i_r1", "mlm_accuracy")


def draw_charts(runs: Mapping[str, Lines]) -> list[str]:
    """Draw what the runs have metrics of.

    Several runs are compared: each metric then has a chart of its own, with a curve a run.

    Args:
        runs: the lines of ``metrics.jsonl`` by the name of the run.
    """
    names = list(dict.fromkeys(name for lines in runs.values() for line in lines for name in line if name != "step"))
    charts = []
    for title, unit, patterns, is_log in [*_CHARTS, *_held_out_charts(names)]:
        wanted = {name: label for pattern in patterns for name in names if (label := _label(name, pattern))}
        if len(runs) == 1:
            [lines] = runs.values()
            panels = [(title, {label: _curve(lines, name) for name, label in wanted.items()})]
        else:
            panels = [
                (
                    title if label == _last(name) and len(wanted) == 1 else f"{title}: {label.replace('_', ' ')}",
                    {run: curve for run, lines in runs.items() if (curve := _curve(lines, name))},
                )
                for name, label in wanted.items()
            ]
        charts += [_draw(heading, unit, curves, list(runs), is_log=is_log) for heading, curves in panels if curves]
    return charts


def _held_out_charts(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...], bool]]:
    splits = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("eval/"))
    return [
        (f"Held-out scores, {split} split", "share", tuple(f"eval/{split}/{score}" for score in _HELD_OUT), False)
        for split in splits
    ]


def _label(name: str, pattern: str) -> str:
    """What a curve is called: what of its name a pattern leaves open. Empty if the name does not match."""
    # The names of splits and corpora are people's: a * or a / at the end of one of them is no pattern.
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
    """One chart; a run has the same colour in all."""
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            place = runs.index(label) if len(runs) > 1 else number
            axes.plot(
                steps,
                values,
                color=COLOURS[place % len(COLOURS)],
                linewidth=1.6,
                marker="o" if len(points) < 12 else None,
                markersize=4,
                label=_plain(label if len(runs) > 1 else label.replace("_", " ")),
            )
        axes.set_title(_plain(textwrap.fill(title, _TITLE_CHARACTERS)), fontsize=10, loc="left", fontweight="bold")
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


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: $ would begin a formula, and a leading _ keeps a label out of the legend."""
    shown = text.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
