"""Export a trained model: ``python pretrain/export.py runs/base_4m --format=huggingface --out=exports/base``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import parse_whole, refuse_unknown, run_command, show_usage_or_stop
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError

USAGE = """Usage: python pretrain/export.py MODEL --format=safetensors|huggingface|reference --out=DIR

MODEL is a run or checkpoint folder, whose float32 weights are exported, or anything else that bridgetower.load_model
opens. DIR gets, by format:
  safetensors  model.safetensors, which bridgetower.load_model opens
  huggingface  a folder that transformers' BridgeTowerForMaskedLM.from_pretrained opens
  reference    model.ckpt, which the published code opens
--image_size_px resizes the position table to images of that side. --drop_heads=itc leaves out heads that the format
does not have."""


def main(
    model: str = "",
    *unexpected: str,
    format: str = "",
    out: str = "",
    image_size_px: str = "",
    drop_heads: str = "",
    **unknown: str,
) -> None:
    """Write a model in one of the formats."""
    if not model:
        show_usage_or_stop("model", unknown, USAGE)
    refuse_unknown(unexpected, unknown, ("format", "out", "image_size_px", "drop_heads"), USAGE)
    if not out or not format:
        raise ConfigError(f"--format and --out are both needed. {USAGE.splitlines()[0]}")
    if format not in _FORMATS:
        raise ConfigError(unknown_name("format", format, _FORMATS))
    side = parse_whole("image_size_px", image_size_px, 1) if image_size_px else None
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out={folder} exists and is not an empty folder. Give another folder.")
    # Imports that take seconds stay behind the checks that do not need them.
    from bridgetower.engine import launch

    launch.read_launch()  # completes the environment that DeepSpeed, which reads a run's checkpoint, is imported with
    from bridgetower.interop.open import load_model

    loaded = load_model(model, image_size_px=side)
    for head in filter(None, drop_heads.split(",")):
        if head not in loaded.heads:
            raise ConfigError(unknown_name("head", head, loaded.heads))
        del loaded.heads[head]
    written = _FORMATS[format](loaded, folder)
    print(f"{written} ({written.stat().st_size:,} bytes)" if written.is_file() else f"{written}")


def _safetensors(model: Any, folder: Path) -> Path:
    from bridgetower.interop.safetensors_file import FILE_NAME, save_safetensors

    save_safetensors(model, folder / FILE_NAME)
    return folder / FILE_NAME


def _huggingface(model: Any, folder: Path) -> Path:
    from bridgetower.data.text import tokenizer_folder
    from bridgetower.interop.huggingface import save_huggingface

    save_huggingface(model, folder, tokenizer_folder=tokenizer_folder(model.config.text.tokenizer))
    return folder


def _reference(model: Any, folder: Path) -> Path:
    from bridgetower.interop.reference import to_reference

    path = folder / "model.ckpt"
    to_reference(model, path)
    return path


_FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "safetensors": _safetensors,
    "huggingface": _huggingface,
    "reference": _reference,
}


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
