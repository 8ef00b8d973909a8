"""Small corpora of the fine-tuning tasks, with real image files, and a small pretrained model to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bridgetower.config.overrides import apply_overrides
from bridgetower.interop.safetensors_file import FILE_NAME, save_safetensors
from bridgetower.model.bridgetower import BridgeTower
from data_prep.record import ImageFile, Record
from pretrain.presets import tiny
from tests.integration.runs import SMALL_MODEL
from tests.small_corpora import build_records, draw, file_of

SMALL = tuple(flag for flag in SMALL_MODEL if not flag.startswith("--optim"))
COLOURS = ("red", "green", "blue")
NUM_ANSWERS = 5
PAIRS_PER_PICTURE = 3


def write_task(folder: Path, task: str, split: str, images: int, *, first: int = 0) -> Path:
    """Build a split of a task, whose labels follow from text and image together.

    Args:
        first: number of the first image; other numbers are other images.

    Returns: the corpus folder.
    """
    raw = folder / "raw" / task / split
    raw.mkdir(parents=True)
    records = []
    for number in range(first, first + images):
        files = [raw / f"{number}-{side}.png" for side in (0, 1)]
        for side, path in enumerate(files):
            path.write_bytes(file_of(draw(number + 7 * side, 30, 20 + number % 3)))
        annotations = [_annotation(task, number, which) for which in range(PAIRS_PER_PICTURE)]
        records.append(
            Record(
                key=f"p{number}",
                image=ImageFile(path=files[0]),
                second_image=ImageFile(path=files[1]) if task == "nlvr2" else None,
                image_id=f"{task}:{number}",
                captions=tuple(f"is picture {number} {COLOURS[which]}" for which in range(PAIRS_PER_PICTURE)),
                annotations=() if task == "retrieval" else tuple(annotations),
                split=split,
            )
        )
    build_records(records, folder / task, samples_per_shard=4, keep_repeats=True)
    return folder / task / split


def _annotation(task: str, number: int, which: int) -> Mapping[str, Any]:
    if task == "vqa":
        best = number % 2 + which
        return {"question_id": 10 * number + which, "labels": [best, (best + 1) % NUM_ANSWERS], "scores": [1.0, 0.3]}
    return {"label": (number % 2 + which) % 3 if task == "snli_ve" else which % 2}


def write_pretrained(folder: Path) -> Path:
    """Write a small model with the heads of pretraining, as pretrain/export.py does."""
    config = apply_overrides(tiny(), dict(flag[2:].split("=", 1) for flag in SMALL)).model
    torch.manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(BridgeTower(config, ("mlm", "itm")), folder / FILE_NAME)
    return folder


def settings(task: str, root: Path, name: str, steps: int) -> dict[str, str]:
    """Return overrides of a tiny preset: 12 pairs per step on the corpora of ``root``, in float32, without dropout."""
    overrides = {
        "init": str(root / "pretrained"),
        "run_root": str(root / "runs"),
        "name": name,
        "data.train_shards": str(root / task / "train"),
        "data.eval_shards": str(root / task / "dev"),
        "data.global_batch_size": "12",
        "data.micro_batch_size": "6",
        "data.augmentation": "none",
        "optim.total_steps": str(steps),
        "evaluation.every_epochs": "0",
        "evaluation.batch_size": "4",
        "tracker.every_steps": "1",
        "engine.deepspeed": "zero2_fp32",
        "engine.threads_per_rank": "1",
        **dict(flag[2:].split("=", 1) for flag in SMALL),
    }
    if task == "vqa":
        overrides["model.heads.num_answers"] = str(NUM_ANSWERS)
    if task == "retrieval":
        overrides |= {"data.negative_group_size": "3", "evaluation.rerank_top_k": "4"}
    return overrides
