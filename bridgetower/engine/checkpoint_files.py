"""The files of one checkpoint: verified, and read without DeepSpeed and without running code.

DeepSpeed reads its files with a full unpickler, which would run code that a file carries. Here they are read with
``weights_only``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower import dist
from bridgetower.errors import CheckpointError
from bridgetower.io.files import sha256_of

COMPLETE_NAME = "COMPLETE.json"
FORMAT_VERSION = 1
WEIGHTS_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class _Opaque:
    """Takes the attributes of one of DeepSpeed's objects, which nobody reads here."""


# DeepSpeed's classes inside the files, by the name under which they are pickled: whoever reads weights need not import
# DeepSpeed, which takes seconds. The enumeration is restored as the integer that it is.
_STAND_INS: tuple[tuple[type, str], ...] = (
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def load_file(path: Path, classes: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]] = _STAND_INS) -> Any:
    """Read one file of a checkpoint without running anything in it.

    Args:
        classes: what the file may hold beside tensors and plain types.

    Raises:
        CheckpointError: the file is damaged, or holds more than data.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types: pickle, zip, runtime and OS errors
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}. If you got it from elsewhere, it may carry code, "
            "which is never run here; otherwise it is damaged: resume from an earlier checkpoint."
        ) from error


def read_description(path: Path) -> dict[str, Any]:
    """Read the COMPLETE.json of a checkpoint.

    Raises:
        CheckpointError: there is none, or it has another format version.
    """
    try:
        description: dict[str, Any] = json.loads((path / COMPLETE_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: no readable {COMPLETE_NAME} ({error}).") from error
    if description.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description.get('format_version')!r}, but this program reads version "
            f"{FORMAT_VERSION}. Use the release that wrote it."
        )
    return description


def find_fault(path: Path) -> str | None:
    """Compare the files of a checkpoint with its COMPLETE.json. The ranks divide the hashing among themselves.

    Returns: a sentence about the first fault, or None; every rank gets the same answer.
    """
    fault: str | None = None
    try:
        files = sorted(read_description(path)["files"].items())
        for index, (name, facts) in enumerate(files):
            file = path / name
            if not file.is_file():
                fault = f"{file} is missing."
            elif file.stat().st_size != facts["bytes"]:
                fault = f"{file} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}."
            elif index % dist.world_size() == dist.rank() and sha256_of(file) != facts["sha256"]:
                fault = f"{file} does not have the content it was written with."
            if fault:
                break
    except CheckpointError as error:
        fault = str(error)
    return next((rank_fault for rank_fault in dist.gather_objects(fault) if rank_fault), None)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Load the module's weights by name, in the precision that they are computed with."""
    weights: dict[str, Tensor] = load_file(checkpoint / WEIGHTS_FILE)["module"]
    return weights


def load_master_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Load the float32 weights that the optimizer keeps. The bfloat16 weights are these, rounded.

    Raises:
        CheckpointError: the files do not fit each other.
    """
    content = load_file(checkpoint / WEIGHTS_FILE)
    files = sorted(
        (int(match[1]), path) for path in checkpoint.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))
    )
    states = [load_file(path)["optimizer_state_dict"] for _, path in files]
    weights: dict[str, Tensor] = {name: value.float() for name, value in content["module"].items()}
    for group_index, shapes in enumerate(content["param_shapes"]):
        # The ranks' partitions are saved without padding, in the order of the group's parameters.
        flat = torch.cat([state["single_partition_of_fp32_groups"][group_index] for state in states]).float()
        num_weights = sum(shape.numel() for shape in shapes.values())
        if len(flat) != num_weights:
            raise CheckpointError(
                f"The optimizer files of {checkpoint} hold {len(flat):,} weights of group {group_index}, but the model "
                f"has {num_weights:,}: a file is missing or belongs to another run. Use an earlier checkpoint."
            )
        offset = 0
        for name, shape in shapes.items():
            weights[name] = flat[offset : offset + shape.numel()].view(shape).clone()
            offset += shape.numel()
    return weights
