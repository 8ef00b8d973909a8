"""The native export: one safetensors file with the model's configuration in its metadata."""

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
from bridgetower.interop.weight_files import detach_for_file, read_safetensors, write_atomically
from bridgetower.model.bridgetower import BridgeTower

FILE_NAME = "model.safetensors"
_KEY = "bridgetower"
_FORMAT_VERSION = 1


def save_safetensors(model: BridgeTower, path: Path) -> None:
    """Write a model's weights and configuration to one file, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    description = {
        "format_version": _FORMAT_VERSION,
        "config": to_dict(model.config),
        "heads": list(model.heads),
    }
    weights = {name: detach_for_file(value) for name, value in model.state_dict().items()}
    metadata = {"format": "pt", _KEY: json.dumps(description)}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata=metadata))


def load_safetensors(path: Path, *, image_size_px: int | None = None) -> BridgeTower:
    """Load the model of a file that ``save_safetensors`` wrote.

    Args:
        image_size_px: side of the images to read, if not the saved one; the position table is resized to it.

    Returns: the model with all its heads, in evaluation mode and the saved floating-point dtype.

    Raises:
        CheckpointError: the file is damaged, is not such an export, has another format version, or lacks a tensor.
    """
    weights = read_safetensors(path)
    description = _read_description(path, _metadata(path))
    try:
        config = from_dict(ModelConfig, description["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that this program cannot build: {error}") from error
    return load_strictly(config, description["heads"], weights, str(path), image_size_px=image_size_px)


def is_own_file(path: Path) -> bool:
    """Return True for a file that ``save_safetensors`` wrote."""
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
            f"{path} was not exported by this program: its metadata has no description of a model. For weights of "
            "Hugging Face's classes, give their folder, with config.json."
        ) from error
    if version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this program reads {_FORMAT_VERSION}. Use the version of the "
            "program that wrote it, or export the model again."
        )
    return description
