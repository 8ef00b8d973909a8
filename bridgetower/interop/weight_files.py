"""Files of weights, read without running anything that they carry, and written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridgetower.errors import CheckpointError


class _Name:
    """Stands for a class that a checkpoint mentions. It does nothing."""


# Lightning before 1.5 (the original METER's is 1.3.2) keeps the state of its callbacks under their classes.
# callbacks/model_checkpoint.py is the only one of both codes that has a state. Seen in pytorch-lightning 1.3.2,
# trainer/callback_hook.py:278; from 1.5 on (seen in 1.5.10) the keys are texts, and a checkpoint holds numbers, texts,
# lists, dictionaries and tensors only.
_INERT = [(_Name, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]

_ASKED_FOR = re.compile(r"GLOBAL (\S+)")


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU, in the zip format mapped from the file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it carries code.
    """
    start = _read_start(path)
    is_zip = start.startswith(b"PK")
    try:
        with torch.serialization.safe_globals(_INERT):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many kinds
        asked_for = _ASKED_FOR.search(str(error))
        if asked_for:
            raise CheckpointError(
                f"{path} carries more than weights: opening it asks for {asked_for[1]}, which could run code. Nothing "
                "of it was run and nothing was loaded. Get the file from its source again; if you trust it, take out "
                "its state_dict with the program that wrote it, and save that alone."
            ) from None
        raise CheckpointError(
            f"{path} is no whole file of torch.save ({first_line(error)}). It may have been cut off: compare its size "
            "with the source's, and copy it again."
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    _read_start(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({first_line(error)}). Copy or download it again."
        ) from error


def own_values(tensor: Tensor) -> Tensor:
    """A tensor for a file: on the CPU, and not a part of a larger one, all of which would be written."""
    value = tensor.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let something write a file under a temporary name, flush it to disk and rename it.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        usual = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(usual)  # safetensors makes files that nobody else can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError of a full disk
        raise CheckpointError(
            f"{path} cannot be written ({first_line(error)}). Make room, or use another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Give a file of weights.") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: a download went wrong. Open it to see why.")
    if not start:
        raise CheckpointError(f"{path} is empty. Copy it again.")
    return start


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
