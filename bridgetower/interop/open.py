"""One door for every kind of checkpoint: ``bridgetower.load_model(path)``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bridgetower.config.snapshot import RUN_FILE, read_model_config
from bridgetower.errors import CheckpointError
from bridgetower.interop import safetensors_file
from bridgetower.interop.huggingface import from_huggingface
from bridgetower.interop.reference import from_reference
from bridgetower.interop.strict import load_strictly
from bridgetower.model.bridgetower import BridgeTower

_CHECKPOINT_FILE = "COMPLETE.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ACCEPTED = """What can be loaded:
  a run folder (its newest good checkpoint), or a checkpoint folder of one
  a safetensors file of pretrain/export.py, or the folder it lies in
  a folder of Hugging Face (config.json and weights), or its name on the hub, such as BridgeTower/bridgetower-base
  a .ckpt file of the published BridgeTower or METER code"""


def load_model(path: str | Path, *, image_size_px: int | None = None) -> BridgeTower:
    """Load a model with all its heads, in float32 and evaluation mode, whatever it was saved as.

    Of a run in bfloat16 the float32 weights are taken that its optimiser keeps.

    Args:
        path: a run folder, a checkpoint folder of one, a safetensors export, a Hugging Face folder or hub name, or a
            ``.ckpt`` of the published code.
        image_size_px: the side of the images it will read; position tables are resized if it was saved with another.

    Raises:
        CheckpointError: there is nothing of that kind, or it is damaged, or not every tensor has its place.
    """
    place = Path(path)
    return _open(place, str(path), image_size_px).float().eval()


def _open(place: Path, given: str, image_size_px: int | None) -> BridgeTower:
    if place.is_dir():
        if (place / RUN_FILE).is_file() or (place / _CHECKPOINT_FILE).is_file():
            return _from_run(place, image_size_px)
        if safetensors_file.is_own_file(place / safetensors_file.FILE_NAME):
            return safetensors_file.load_safetensors(place / safetensors_file.FILE_NAME, image_size_px=image_size_px)
        if _is_huggingface(place):
            return from_huggingface(place, image_size_px=image_size_px)
        raise CheckpointError(f"{place} is a folder without a model in it. {_ACCEPTED}")
    if place.is_file():
        if place.suffix != ".safetensors":
            return from_reference(place, image_size_px=image_size_px)
        if not safetensors_file.is_own_file(place) and _is_huggingface(place.parent):
            return from_huggingface(place.parent, image_size_px=image_size_px)
        return safetensors_file.load_safetensors(place, image_size_px=image_size_px)
    if _HUB_NAME.fullmatch(given) and not place.parent.exists():
        return from_huggingface(given, image_size_px=image_size_px)
    raise CheckpointError(f"There is no {place}. {_ACCEPTED}")


def _is_huggingface(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("model_type") == "bridgetower")
    except (OSError, ValueError, AttributeError):
        return False


def _from_run(place: Path, image_size_px: int | None) -> BridgeTower:
    from bridgetower.engine.checkpoint import find_checkpoint
    from bridgetower.engine.checkpoint_files import load_master_weights

    run = place.parent.parent if place.parent.name == "checkpoints" else place
    config, heads = read_model_config(run / RUN_FILE)
    checkpoint = find_checkpoint(place)
    weights = {name.removeprefix("model."): value for name, value in load_master_weights(checkpoint).items()}
    return load_strictly(config, heads, weights, str(checkpoint), image_size_px=image_size_px)
