"""Report one run, or compare several, in one HTML file that opens anywhere without a network.

``python pretrain/report.py runs/demo``, ``python pretrain/report.py runs/a runs/b --out=compared.html``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fire
from fire.decorators import SetParseFn
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bridgetower.config.cli import refuse_unknown, run_command
from bridgetower.config.snapshot import RUN_FILE, read_run_file
from bridgetower.engine.metrics_file import read_metrics
from bridgetower.engine.score_file import EVAL_NAME, PREDICTIONS_NAME
from bridgetower.errors import ConfigError, DataError
from bridgetower.evaluation.table import LABELS, format_score
from bridgetower.io.files import shorten_paths, write_atomically
from bridgetower.shards.manifest import Manifest, load_manifest
from pretrain.report_samples import PageImages, describe_samples

if TYPE_CHECKING:
    from pretrain.report_charts import Lines

USAGE = """Usage: python pretrain/report.py RUN [RUN ...] [--out=FILE]

FILE is report.html in the run folder; for several runs, report.html in the folder above the first run's."""

# Scores of the headline split that stand in large type at the top, where a run has them.
_TILES = ("vqa_score", "accuracy", "itm_balanced_accuracy", "t2i_r1", "itc_t2i_r1", "mlm_accuracy")


class _Run(NamedTuple):
    """The content of a run folder; what a run has not written yet is empty."""

    name: str
    folder: Path
    description: dict[str, Any]
    """run.json"""
    lines: Lines
    """metrics.jsonl"""
    scores: dict[str, Any]
    """eval.json"""
    predictions: dict[str, Any]
    """predictions.json"""
    deepspeed: dict[str, Any]
    """deepspeed.json"""


def main(*runs: str, out: str = "", **unknown: str) -> None:
    """Write the report of one run or several."""
    refuse_unknown((), unknown, ["out"], USAGE)
    if not runs:
        raise ConfigError(f"Which run? {USAGE}")
    folders = [Path(run) for run in runs]
    path = Path(out) if out else (folders[0] if len(runs) == 1 else folders[0].absolute().parent) / "report.html"
    page = render(*folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    print(f"{path} ({len(page) / 1e6:.1f} MB)")


def render(*folders: Path) -> str:
    """Return the HTML page of run folders; a run that has just begun has a report too.

    Raises:
        ConfigError: a folder is not a run folder, or is given twice.
    """
    from pretrain.report_charts import draw_charts  # it imports matplotlib, which the usage does without

    absolute = [folder.absolute() for folder in folders]
    if twice := [folder for index, folder in enumerate(folders) if absolute[index] in absolute[:index]]:
        raise ConfigError(f"{twice[0]} is given twice. Give each run once.")
    names = shorten_paths(absolute)
    runs = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    images = PageImages()
    descriptions = [_describe(run, images) for run in runs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=" · ".join(names),
        runs=descriptions,
        tiles=_tiles(runs[0].scores) if len(runs) == 1 else [],
        score_rows=_score_rows(runs),
        charts=draw_charts({run.name: run.lines for run in runs}),
        differences=_differences([run.description["config"] for run in runs]),
        image_rules=images.rules,
        attributions=sorted({line for description in descriptions for line in description["attributions"]}),
    )


def _read(folder: Path, name: str) -> _Run:
    return _Run(
        name,
        folder,
        read_run_file(folder / RUN_FILE),
        read_metrics(folder),
        _read_json(folder / EVAL_NAME),
        _read_json(folder / PREDICTIONS_NAME),
        _read_json(folder / "deepspeed.json"),
    )


def _describe(run: _Run, images: PageImages) -> dict[str, Any]:
    """Return what the template shows of one run."""
    manifests = [(path, role, _manifest(path)) for path, role in _corpora(run.description["config"])]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "summary": _summary(run.description, run.lines),
        "splits": list(run.scores["splits"]) if run.scores else [],
        "score_step": run.scores["step"] if run.scores else 0,
        "corpora": [_corpus_row(*corpus) for corpus in manifests],
        "samples": [
            describe_samples(split, content, images) for split, content in run.predictions.get("splits", {}).items()
        ],
        "run_json": json.dumps(run.description, indent=1),
        "deepspeed_json": json.dumps(run.deepspeed, indent=1),
        "attributions": {m.attribution for _, _, m in manifests if m is not None and m.attribution},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Delete it; evaluate_run.py writes a new one.") from error


def _corpora(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the folder of each corpus and what it is used for."""
    data = config["data"]
    return [(path, "training") for path in data["train_shards"]] + [(path, "held out") for path in data["eval_shards"]]


def _manifest(path: str) -> Manifest | None:
    try:
        return load_manifest(path)
    except DataError:  # the report may be written on another machine, which does not have the corpus
        return None


def _summary(description: Mapping[str, Any], lines: Lines) -> str:
    """Return the line below the title: progress, machine, precision, seed and commit."""
    config = description["config"]
    step = int(lines[-1]["step"]) if lines else 0
    total, batch = config["optim"]["total_steps"], config["data"]["global_batch_size"]
    facts = [
        f"{step:,} of {total:,} steps of {batch:,} pairs",
        f"{step * batch:,} pairs seen",
        f"{description['world_size']} x {description['device'].split(':')[0]}, {description['precision']}, "
        f"{description['optimizer']} AdamW",
        f"seed {config['seed']}",
    ]
    if description["commit"]:
        facts.append(f"commit {description['commit'][:10]}")
    return " · ".join(facts)


def _tiles(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the scores of the headline split that stand in large type at the top."""
    if not scores:
        return []
    headline = scores["headline_split"]
    split = scores["splits"][headline]
    tiles = []
    for name in _TILES:
        if name in split["scores"]:
            chance = f", chance {format_score(name, split['chance'][name])}" if name in split["chance"] else ""
            tiles.append(
                {
                    "label": LABELS[name],
                    "value": format_score(name, split["scores"][name]),
                    "note": f"{headline} split{chance}",
                }
            )
    return tiles


def _score_rows(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Return a row per score, with a cell for each split of each run."""
    splits = [split for run in runs for split in run.scores.get("splits", {}).values()]
    rows = []
    for name, label in LABELS.items():
        cells = [
            {
                "value": format_score(name, split["scores"][name]),
                "chance": format_score(name, split["chance"][name]) if name in split["chance"] else "",
            }
            if name in split["scores"]
            else None
            for split in splits
        ]
        if any(cells):
            rows.append({"label": label, "cells": cells})
    return rows


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with the value of each run."""
    settings = [dict(_flatten(config)) for config in configs]
    names = dict.fromkeys(name for of_run in settings for name in of_run if name != "name")
    rows = [(name, [of_run.get(name, "–") for of_run in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted names of all settings with their values as text."""
    flat: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return flat


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


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
