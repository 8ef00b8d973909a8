"""A run as one HTML file that opens anywhere, without a network: ``python pretrain/report.py runs/demo``."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from bridgetower.config.cli import refuse_unknown, run_command
from bridgetower.config.snapshot import RUN_FILE, read_run_file
from bridgetower.data.manifest import Manifest, load_manifest
from bridgetower.engine.evaluate import EVAL_NAME, PREDICTIONS_NAME
from bridgetower.engine.tracker import read_metrics
from bridgetower.errors import ConfigError, DataError
from bridgetower.files import write_atomically
from pretrain.score_table import LABELS, format_score

USAGE = "Usage: python pretrain/report.py RUN [--out=FILE]   (default: report.html in the run folder)"

_COLOURS = ("#2563a8", "#c8553d", "#3a8f5d", "#8a5fa8", "#b98a1d", "#4b5563")
_TILES = ("itm_balanced_accuracy", "t2i_r1", "itc_t2i_r1", "mlm_accuracy")
_THUMBNAIL_PX = 144
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
_HELD_OUT_CURVES = ("itm_balanced_accuracy", "t2i_r1", "itc_t2i_r1", "mlm_accuracy")


def main(run: str = "", *unexpected: str, out: str = "", **unknown: str) -> None:
    """Write the report of a run."""
    refuse_unknown(unexpected, unknown, ["out"], USAGE)
    if not run:
        raise ConfigError(f"Which run? {USAGE}")
    folder = Path(run)
    path = Path(out) if out else folder / "report.html"
    page = render(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    print(f"{path} ({len(page) / 1e6:.1f} MB)")


def render(folder: Path) -> str:
    """The page for a run folder, from what is there: a run that has just begun has a report too.

    Raises:
        ConfigError: the folder is not a run's.
    """
    run = read_run_file(folder / RUN_FILE)
    metrics = read_metrics(folder)
    scores = _read_json(folder / EVAL_NAME)
    predictions = _read_json(folder / PREDICTIONS_NAME)
    manifests = {path: (role, _manifest(path)) for path, role in _corpora(run["config"])}
    attributions = {m.attribution for _, m in manifests.values() if m is not None and m.attribution}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        name=run["config"]["name"],
        folder=str(folder),
        summary=_summary(run, metrics),
        tiles=_tiles(scores),
        splits=list(scores["splits"]) if scores else [],
        score_step=scores["step"] if scores else 0,
        score_rows=_score_rows(scores),
        charts=_charts(metrics),
        corpora=[_corpus_row(path, role, manifest) for path, (role, manifest) in manifests.items()],
        samples=[_sample_section(split, content) for split, content in predictions.get("splits", {}).items()],
        run_json=json.dumps(run, indent=1),
        deepspeed_json=json.dumps(_read_json(folder / "deepspeed.json"), indent=1),
        attributions=sorted(attributions),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Delete it; evaluate_run.py makes it anew.") from error


def _corpora(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = config["data"]
    return [(path, "training") for path in data["train_shards"]] + [(path, "held out") for path in data["eval_shards"]]


def _manifest(path: str) -> Manifest | None:
    try:
        return load_manifest(path)
    except DataError:  # a report may be made on another machine than the run
        return None


def _summary(run: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> str:
    config = run["config"]
    step = int(metrics[-1]["step"]) if metrics else 0
    total, batch = config["optim"]["total_steps"], config["data"]["global_batch_size"]
    parts = [
        f"{step:,} of {total:,} steps of {batch:,} pairs",
        f"{step * batch:,} pairs seen",
        f"{run['world_size']} x {run['device'].split(':')[0]}, {run['precision']}, {run['optimizer']} AdamW",
        f"seed {config['seed']}",
    ]
    if run["commit"]:
        parts.append(f"commit {run['commit'][:10]}")
    return " · ".join(parts)


def _tiles(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    if not scores:
        return []
    headline = scores["headline_split"]
    own = scores["splits"][headline]
    tiles = []
    for name in _TILES:
        if name in own["scores"]:
            chance = f", guessing {format_score(name, own['chance'][name])}" if name in own["chance"] else ""
            tiles.append(
                {
                    "label": LABELS[name],
                    "value": format_score(name, own["scores"][name]),
                    "note": f"{headline} split{chance}",
                }
            )
    return tiles


def _score_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, label in LABELS.items() if scores else []:
        cells = [
            {
                "value": format_score(name, part["scores"][name]),
                "chance": format_score(name, part["chance"][name]) if name in part["chance"] else "",
            }
            if name in part["scores"]
            else None
            for part in scores["splits"].values()
        ]
        if any(cells):
            rows.append({"label": label, "cells": cells})
    return rows


def _charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for line in metrics for name in line if name != "step"))
    charts = []
    for title, unit, wanted, is_log in _CHARTS:
        curves = {
            label: _curve(metrics, name) for pattern in wanted for name in names if (label := _label(name, pattern))
        }
        if curves:
            charts.append(_draw(title, unit, curves, is_log=is_log))
    splits = list(dict.fromkeys(name.split("/")[1] for name in names if name.startswith("eval/")))
    for split in splits:
        curves = {
            LABELS[score].split(" (")[0]: _curve(metrics, f"eval/{split}/{score}")
            for score in _HELD_OUT_CURVES
            if f"eval/{split}/{score}" in names
        }
        if curves:
            charts.append(_draw(f"Held-out scores, {split} split", "share", curves, is_log=False))
    return charts


def _label(name: str, pattern: str) -> str:
    """What a curve is called: what of its name a pattern leaves open. Empty if the name does not match."""
    expression = re.escape(pattern).replace(r"\*", "([^/]+)") + ("(.+)" if pattern.endswith("/") else "")
    match = re.fullmatch(expression, name)
    if match is None:
        return ""
    return " ".join(match.groups()) or name.rpartition("/")[2]


def _curve(metrics: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in metrics if name in line]


def _draw(title: str, unit: str, curves: Mapping[str, list[tuple[float, float]]], *, is_log: bool) -> str:
    """One chart as inline SVG, with its text as text."""
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            is_sparse = len(points) < 12
            axes.plot(
                steps,
                values,
                color=_COLOURS[number % len(_COLOURS)],
                linewidth=1.6,
                marker="o" if is_sparse else None,
                markersize=4,
                label=label.replace("_", " "),
            )
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        if unit:
            axes.set_ylabel(unit)
        if is_log:
            axes.set_yscale("log")
        elif all(value >= 0 for points in curves.values() for _, value in points):
            axes.set_ylim(bottom=0)
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    drawing = stream.getvalue()
    return drawing[drawing.index("<svg") :]


def _corpus_row(path: str, role: str, manifest: Manifest | None) -> dict[str, str]:
    if manifest is None:
        return {"folder": path, "role": role, "images": ""}
    totals = manifest.totals
    return {
        "folder": path,
        "role": role,
        "images": f"{totals.images:,}",
        "captions": f"{totals.captions:,}",
        "words": f"{totals.caption_words / max(totals.captions, 1):.1f}",
        "megabytes": f"{totals.bytes / 1e6:,.1f}",
        "rejects": ", ".join(f"{count} {reason}" for reason, count in totals.rejects.items()) or "0",
    }


def _sample_section(split: str, content: Mapping[str, Any]) -> dict[str, Any]:
    pictures = {int(number): _thumbnail(data) for number, data in content["pictures"].items()}
    return {
        "split": split,
        "samples": [
            {
                "caption": sample["caption"],
                "picture": pictures[sample["picture"]],
                "match": sample.get("match_probability"),
                "words": sample["masked_words"],
                "captions": sample.get("best_captions", []),
                "pictures": [(pictures[n], is_right) for n, is_right in sample.get("best_pictures", [])],
            }
            for sample in content["samples"]
        ],
    }


def _thumbnail(data: str) -> str:
    """A small PNG or JPEG as a data URI."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        kind = "png" if image.format == "PNG" and max(image.size) <= _THUMBNAIL_PX else "jpeg"
        picture = image.convert("RGB")
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    stream = io.BytesIO()
    picture.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
