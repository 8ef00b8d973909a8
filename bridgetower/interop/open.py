"""One function for every kind of checkpoint: ``bridgetower.load_model(path)``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bridgetower.config.snapshot import RUN_FILE, read_model_config
from bridgetower.errors import CheckpointError

if TYPE_CHECKING:
    from bridgetower.model.bridgetower import BridgeTower

# Each format is imported where it is opened: transformers alone costs as much CPU time as torch.

_CHECKPOINT_FILE = "COMPLETE.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ACCEPTED = """`load_model` opens:
  a run folder (its newest intact checkpoint), or one checkpoint folder of a run
  a safetensors file that pretrain/export.py wrote, or the folder it is in
  a Hugging Face folder (config.json and weights), or a name on the Hub, such as BridgeTower/bridgetower-base
  a .ckpt file of the published BridgeTower or METER code"""


def load_model(path: str | Path, *, image_size_px: int | None = None) -> BridgeTower:
    """Load a model with all its heads, in float32 and evaluation mode, whatever precision it was saved in.

    A run in bfloat16 is loaded from the float32 weights that its optimizer keeps.

    Args:
        path: a run folder, a checkpoint folder of a run, a safetensors export, a Hugging Face folder or Hub name, or a
            ``.ckpt`` file of the published code.
        image_size_px: side of the images that the model will read. Position tables are interpolated if the model was
            saved with another size.

    Raises:
        CheckpointError: nothing of these kinds is there, it is damaged, or a tensor is missing or left over.
    """
    return _open(Path(path), str(path), image_size_px).float().eval()


def _open(path: Path, given: str, image_size_px: int | None) -> BridgeTower:
    if path.is_dir():
        return _open_folder(path, image_size_px)
    if path.is_file():
        return _open_file(path, image_size_px)
    if _HUB_NAME.fullmatch(given) and not path.parent.exists():
        return _open_huggingface(given, image_size_px)
    raise CheckpointError(f"There is no file or folder {path}. {_ACCEPTED}")


def _open_folder(folder: Path, image_size_px: int | None) -> BridgeTower:
    from bridgetower.interop import safetensors_file

    if (folder / RUN_FILE).is_file() or (folder / _CHECKPOINT_FILE).is_file():
        return _open_run(folder, image_size_px)
    if safetensors_file.is_own_file(folder / safetensors_file.FILE_NAME):
        return safetensors_file.load_safetensors(folder / safetensors_file.FILE_NAME, image_size_px=image_size_px)
    if _is_huggingface(folder):
        return _open_huggingface(folder, image_size_px)
    raise CheckpointError(f"There is no model in the folder {folder}. {_ACCEPTED}")


def _open_file(file: Path, image_size_px: int | None) -> BridgeTower:
    from bridgetower.interop import safetensors_file

    if file.suffix != ".safetensors":
        from bridgetower.interop.reference import from_reference

        return from_reference(file, image_size_px=image_size_px)
    if not safetensors_file.is_own_file(file) and _is_huggingface(file.parent):
        return _open_huggingface(file.parent, image_size_px)
    return safetensors_file.load_safetensors(file, image_size_px=image_size_px)


def _open_huggingface(source: str | Path, image_size_px: int | None) -> BridgeTower:
    from bridgetower.interop.huggingface import from_huggingface

    return from_huggingface(source, image_size_px=image_size_px)


def _is_huggingface(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("model_type") == "bridgetower")
    except (OSError, ValueError, AttributeError):
        return False


def _open_run(folder: Path, image_size_px: int | None) -> BridgeTower:
    from bridgetower.engine.checkpoint import find_checkpoint
    from bridgetower.engine.checkpoint_files import load_master_weights
    from bridgetower.interop.strict import load_strictly

    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    config, heads = read_model_config(run / RUN_FILE)
    checkpoint = find_checkpoint(folder)
    weights = {name.removeprefix("model."): value for name, value in load_master_weights(checkpoint).items()}
    return load_strictly(config, heads, weights, str(checkpoint), image_size_px=image_size_px)
