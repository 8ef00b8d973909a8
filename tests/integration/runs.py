"""Short real runs of pretrain/train.py, and the files that they leave behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.engine.checkpoint_files import load_file, load_weights
from tests.conftest import run_script

# A model that trains in seconds and still has every component: two bridged layers, three objectives, two rates.
SMALL_MODEL = (
    "--model.vision.patch_size_px=24",
    "--model.vision.width=32",
    "--model.vision.num_layers=2",
    "--model.vision.num_heads=2",
    "--model.text.width=32",
    "--model.text.num_layers=2",
    "--model.text.num_heads=2",
    "--model.fusion.width=32",
    "--model.fusion.num_layers=2",
    "--model.fusion.num_heads=2",
    "--optim.fusion_lr_scale=5",
)
FLOAT32 = ("--engine.deepspeed=zero2_fp32",)
NO_DROPOUT = ("--model.text.dropout=0", "--model.fusion.dropout=0")


def settings(run_root: Path, shards: Path, name: str, steps: int, *more: str) -> list[str]:
    """Build the arguments of a short run on the emoji shards: 64 pairs per step, every step logged."""
    return [
        "tiny",
        f"--run_root={run_root}",
        f"--name={name}",
        f"--data.train_shards={shards / 'train'}",
        "--data.eval_shards=",
        "--data.global_batch_size=64",
        "--data.micro_batch_size=32",
        f"--optim.total_steps={steps}",
        "--checkpoint.every_steps=1000",
        "--evaluation.every_steps=0",
        "--tracker.every_steps=1",
        *SMALL_MODEL,
        *more,
    ]


def train(
    run_root: Path,
    shards: Path,
    name: str,
    steps: int,
    *more: str,
    ranks: int = 0,
    code: int = 0,
    launcher: str = "",
) -> subprocess.CompletedProcess[str]:
    """Train a short run to its end."""
    words = settings(run_root, shards, name, steps, *more)
    return run_script("pretrain/train.py", *words, ranks=ranks, code=code, launcher=launcher)


def metrics(run_root: Path, name: str, prefixes: Sequence[str] = ("train/", "optim/")) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl, without the metrics that depend on the clock."""
    lines = [json.loads(line) for line in (run_root / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or k.startswith(tuple(prefixes))} for line in lines]


def last_checkpoint(run_root: Path, name: str) -> Path:
    """Find the newest checkpoint of a run."""
    folder = run_root / name / "checkpoints"
    return folder / (folder / "latest").read_text()


def weights(run_root: Path, name: str) -> dict[str, Tensor]:
    """Load the weights that a run ended with."""
    return load_weights(last_checkpoint(run_root, name))


def optimizer_tensors(run_root: Path, name: str) -> list[Tensor]:
    """Load every tensor of the optimizer's files, by rank and in a fixed order."""
    tensors: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, (list, tuple)):
            for element in value:
                collect(element)

    for path in sorted(last_checkpoint(run_root, name).glob("*optim_states.pt")):
        collect(load_file(path)["optimizer_state_dict"])
    return tensors


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Compute the norm of the difference, relative to the norm of ``one``."""
    return float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-12))


def assert_same_tensors(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Compare two lists of tensors bit for bit."""
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
