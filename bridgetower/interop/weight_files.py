"""Weight files: read without running code that they may carry, written atomically."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridgetower.errors import CheckpointError


class _Placeholder:
    """Stands in for a class that a checkpoint names, and does nothing."""


# Lightning before 1.5 (the original METER uses 1.3.2) keys the state of callbacks by their class, and ModelCheckpoint
# is the only callback with a state in BridgeTower's and METER's code (pytorch-lightning 1.3.2,
# trainer/callback_hook.py:278). From 1.5 on (read in 1.5.10) the keys are strings, so that a checkpoint holds nothing
# but numbers, strings, lists, dictionaries and tensors.
_HARMLESS_CLASSES = [(_Placeholder, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]

# How torch.load names what it refuses to import.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_torch_file(path: Path) -> Any:
    """Read what ``torch.save`` wrote, with tensors on the CPU. Files in the zip format are memory-mapped.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it carries code.
    """
    is_zip = _read_first_bytes(path).startswith(b"PK")
    try:
        with torch.serialization.safe_globals(_HARMLESS_CLASSES), warnings.catch_warnings():  # type: ignore[arg-type]
            # A TorchScript file is refused below; torch's advice to call torch.jit.load would only mislead.
            warnings.filterwarnings("ignore", message=".*looks like a TorchScript archive")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises errors of many classes
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused:
            raise CheckpointError(
                f"{path} carries more than weights: to open it means to import {refused[1]}, which could run code. "
                "Nothing was run and nothing was loaded. Get the file from its source again; if you trust it, open it "
                "with the program that wrote it and save its state_dict alone."
            ) from None
        raise CheckpointError(
            f"{path} is not a complete file of torch.save ({first_line(error)}). It may be truncated: compare its size "
            "with the original's, and copy it again."
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, memory-mapped.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    _read_first_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({first_line(error)}). Copy or download it again."
        ) from error


def detach_for_file(tensor: Tensor) -> Tensor:
    """Return a tensor as a file takes it: on the CPU, contiguous, with a storage of its own.

    A view into a larger buffer (DeepSpeed keeps parameters so) is copied: ``torch.save`` would write the whole buffer.
    """
    value = tensor.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to disk and rename it.

    ``bridgetower.io.files.write_atomically`` takes bytes; here the writers of torch and safetensors write the file
    themselves, so that no second copy of the weights is held in memory.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors creates files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        raise CheckpointError(
            f"{path} cannot be written ({first_line(error)}). Free some disk space, or use another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_first_bytes(path: Path) -> bytes:
    """Return a file's first 64 bytes.

    Raises:
        CheckpointError: the file cannot be read, is empty, or is what a failed download leaves.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Give the path of a weight file.") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with: git lfs pull.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: a download failed. Open it to see why.")
    if not start:
        raise CheckpointError(f"{path} is empty. Copy it again.")
    return start


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
