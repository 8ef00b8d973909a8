"""Folders and hub names of transformers' BridgeTower models: read the configuration and the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bridgetower.errors import CheckpointError
from bridgetower.interop.weight_files import first_line, read_safetensors, read_torch_file

if TYPE_CHECKING:
    from transformers import BridgeTowerConfig


def find_folder(source: str) -> Path:
    """Return the folder of a path, or download that of a hub name such as ``BridgeTower/bridgetower-base``.

    Raises:
        CheckpointError: it is neither, or the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source} is neither a folder nor a hub name such as BridgeTower/bridgetower-base. Give the folder that "
            "holds config.json and the weights."
        )
    from huggingface_hub import snapshot_download

    try:
        # safetensors first; the pickled weights are downloaded only where there are no others.
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(snapshot_download(source, allow_patterns=["config.json", weights, f"{weights}.index.json"]))
            if list(folder.glob(weights)):
                break
    except Exception as error:  # the hub's client raises errors of many classes
        raise CheckpointError(
            f"{source} is not a folder here, and could not be downloaded from the hub: {first_line(error)} Give a "
            "folder, or run once where the hub can be reached (the download is cached)."
        ) from error
    return folder


def read_config_file(folder: Path) -> BridgeTowerConfig:
    """Read a folder's config.json.

    Raises:
        CheckpointError: it is missing, damaged, or another model's.
    """
    from transformers import BridgeTowerConfig

    file = folder / "config.json"
    try:
        model_type = json.loads(file.read_bytes()).get("model_type")
        if model_type != "bridgetower":
            raise ValueError(f"its model_type is {model_type!r}, not 'bridgetower'")
        return BridgeTowerConfig.from_pretrained(str(folder))
    except Exception as error:  # transformers raises errors of many classes
        raise CheckpointError(
            f"{file} does not describe a BridgeTower ({error}). Give the folder of one, with config.json and weights."
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a folder's tensors, from one file or from several with an index; safetensors are preferred.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged or carries code.
    """
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index, read)
    raise CheckpointError(
        f"{folder} has no weights: no model.safetensors and no pytorch_model.bin, in one file or with an index. Copy "
        "the folder again."
    )


def _read_indexed(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        file_of_tensor: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(file_of_tensor.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({error}). Copy the folder again.") from error
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(
            f"{index} names files outside its folder: {', '.join(outside)}. Do not trust it; get the folder from its "
            "source again."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read(index.parent / file))
    missing = sorted(file_of_tensor.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{index} lists {len(missing)} tensor(s) that its files do not hold: {', '.join(missing[:20])}. Copy the "
            "folder again."
        )
    return tensors


def _read_bin(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, and not a dictionary of tensors alone. Copy the folder again."
        )
    return content
