"""Our own export: one safetensors file that says itself which model it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bridgetower.config.model import ModelConfig
from bridgetower.config.overrides import from_dict, to_dict
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.strict import load_strictly
from bridgetower.interop.weight_files import own_values, read_safetensors, write_whole
from bridgetower.model.bridgetower import BridgeTower

FILE_NAME = "model.safetensors"
_KEY = "bridgetower"
_FORMAT_VERSION = 1


def save_safetensors(model: BridgeTower, path: Path) -> None:
    """Write a model with its configuration, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    description = {
        "format_version": _FORMAT_VERSION,
        "config": to_dict(model.config),
        "heads": list(model.heads),
    }
    weights = {name: own_values(value) for name, value in model.state_dict().items()}
    metadata = {"format": "pt", _KEY: json.dumps(description)}
    write_whole(path, lambda place: save_file(weights, place, metadata=metadata))


def load_safetensors(path: Path, *, image_size_px: int | None = None) -> BridgeTower:
    """Read what ``save_safetensors`` wrote.

    Args:
        image_size_px: another side of the images than it was saved with; position tables are resized.

    Raises:
        CheckpointError: the file is damaged, of another kind or version, or does not hold the whole model.
    """
    weights = read_safetensors(path)
    description = _read_description(path, _metadata(path))
    try:
        config = from_dict(ModelConfig, description["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that this program does not know: {error}") from error
    return load_strictly(config, description["heads"], weights, str(path), image_size_px=image_size_px)


def is_own_file(path: Path) -> bool:
    """Whether a safetensors file was written by ``save_safetensors``."""
    try:
        return _KEY in _metadata(path)
    except (OSError, SafetensorError):
        return False


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _read_description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(metadata[_KEY])
        version = description["format_version"]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} was not exported by this program: it does not say which model it holds. For weights of Hugging "
            "Face give their folder, with config.json."
        ) from error
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}, this program reads {_FORMAT_VERSION}.")
    return description
