"""A run reports the metrics that docs/metrics.md lists, and W&B has them under the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bridgetower.data.corpora import Corpora
from tests.conftest import REPO
from tests.integration.runs import train
from tests.wandb_files import read_history

# Metrics that only a run on GPUs has.
ON_GPUS = {"speed/tflops_per_rank", "speed/mfu", "memory/device_peak_gb", "memory/device_reserved_gb"}
PLACEHOLDERS = {
    "OBJECTIVE": "(?:mlm|itm|itc)",
    "CORPUS": "(?:train|concept)",
    "GROUP": "[a-z_]+",
    "SPLIT": "combination",
}


def list_documented_names() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (REPO / "docs/metrics.md").read_text(), flags=re.MULTILINE)


def to_expression(name: str) -> str:
    for placeholder, pattern in PLACEHOLDERS.items():
        name = name.replace(placeholder, pattern)
    return name.replace("SCORE", "[a-z0-9_]+")


@pytest.fixture(scope="module")
def run(emoji_shards, tmp_path_factory) -> Path:
    """Train on two corpora, with log, evaluation and checkpoint at every step, and W&B without a key."""
    root = tmp_path_factory.mktemp("runs")
    words = [
        f"--data.train_shards={emoji_shards / 'train'},{emoji_shards / 'concept'}",
        f"--data.eval_shards={emoji_shards / 'combination'}",
        "--evaluation.every_steps=1",
        "--evaluation.max_images=20",
        "--evaluation.num_samples=2",
        "--checkpoint.every_steps=1",
        "--tracker.wandb=auto",
    ]
    train(root, emoji_shards, "run", 3, *words)
    return root / "run"


def read_lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_name_is_documented_and_every_documented_name_is_reported(run):
    names = {name for line in read_lines(run) for name in line} - {"step"}
    expressions = {name: to_expression(name) for name in list_documented_names()}
    assert [name for name in names if not any(re.fullmatch(e, name) for e in expressions.values())] == []
    reported = {known for known, e in expressions.items() if any(re.fullmatch(e, name) for name in names)}
    assert set(expressions) - reported == ON_GPUS


def test_weighted_mean_over_the_corpora_is_the_metric_of_all(run):
    # With 64 pairs a step the smaller corpus does not always have a masked token.
    line = next(line for line in read_lines(run) if "train/corpus/concept/loss/mlm" in line)
    fractions = [line["train/corpus/train/share"], line["train/corpus/concept/share"]]
    assert sum(fractions) == pytest.approx(1) and min(fractions) > 0
    for name in ("loss/itm", "accuracy/itm", "loss/itc", "accuracy/itc"):  # means over pairs
        values = [line[f"train/corpus/train/{name}"], line[f"train/corpus/concept/{name}"]]
        weighted = sum(fraction * value for fraction, value in zip(fractions, values, strict=True))
        assert weighted == pytest.approx(line[f"train/{name}"], rel=1e-5)
    low, high = sorted([line["train/corpus/train/loss/mlm"], line["train/corpus/concept/loss/mlm"]])
    assert low <= line["train/loss/mlm"] <= high


def test_wandb_has_every_line_under_the_same_names(run):
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    sent: dict[int, dict[str, float]] = {}
    for line in read_history(file):
        sent.setdefault(line["_step"], {}).update({k: v for k, v in line.items() if not k.startswith("_")})
    written: dict[int, dict[str, float]] = {}
    for line in read_lines(run):
        written.setdefault(int(line["step"]), {}).update({k: v for k, v in line.items() if k != "step"})
    assert sent == written
    assert (run / "wandb_sent").read_text() == "3" and len((run / "wandb_id").read_text()) == 8


def test_corpora_are_named_by_the_shortest_suffix_of_their_paths_that_distinguishes_them(emoji_shards, tmp_path):
    for folder in ("one/train", "two/train"):
        (tmp_path / folder).parent.mkdir()
    (tmp_path / "one/train").symlink_to(emoji_shards / "train")
    (tmp_path / "two/train").symlink_to(emoji_shards / "concept")
    folders = [tmp_path / "one/train", tmp_path / "two/train", emoji_shards / "combination"]
    assert Corpora(folders).names == ["one-train", "two-train", "combination"]
