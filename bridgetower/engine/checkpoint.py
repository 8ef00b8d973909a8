"""Checkpoints: DeepSpeed's files, published whole or not at all, verified before they are read, at any world size.

A checkpoint is written under a temporary name, flushed, described by COMPLETE.json (step, sizes, SHA-256) and then
renamed: a folder named ``stepNNNNNNN`` is complete. DeepSpeed reads its files with a full unpickler, which would run
code that a file carries; here they are read with ``weights_only``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from bridgetower import dist
from bridgetower.errors import CheckpointError
from bridgetower.io.files import sha256_of, write_atomically

logger = logging.getLogger(__name__)

COMPLETE_NAME = "COMPLETE.json"
_FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step(\d{7,})")
_UNFINISHED = "unfinished-"
_WEIGHTS_FILE = "mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
# What DeepSpeed's files hold beside tensors and plain types. None of them runs code when it is restored.
_SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
# ZeRO-2 pads the flat buffer of a group to a multiple of this many elements per rank.
_ALIGNMENT_PER_RANK = 2


@dataclass
class TrainState:
    """How far a run is. Order, masks, negatives and dropout are functions of it, so there is no other state."""

    step: int = 0
    """Optimiser steps done."""
    pairs_seen: int = 0


def load_file(path: Path) -> dict[str, Any]:
    """Read one file of a checkpoint without running anything in it.

    Raises:
        CheckpointError: the file is damaged, or holds more than data.
    """
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return content
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, OS
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}. If it is from elsewhere, it may carry code, "
            "which is never run here; otherwise it is damaged: resume from an earlier checkpoint."
        ) from error


class CheckpointFiles(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Writes and reads the single files for DeepSpeed: safely, and for another world size if need be."""

    def __init__(self) -> None:
        """Take the place of the engine's own."""
        super().__init__(None)
        self.zipfile_serialization = True
        self.written: list[Path] = []
        self.errors: list[str] = []
        self.saved_world_size = dist.world_size()

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file. An error is kept for later: raising here would leave the other ranks waiting."""
        try:
            torch.save(state_dict, path)
            with Path(path).open("rb") as file:
                os.fsync(file.fileno())
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self.errors.append(f"rank {dist.rank()} could not write {path}: {error}")

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read one file."""
        file = Path(path)
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match and self.saved_world_size != dist.world_size():
            return _reshard(file, int(match[1]), self.saved_world_size, dist.world_size())
        content = load_file(file)
        if file.name == _WEIGHTS_FILE:
            content["dp_world_size"] = dist.world_size()  # _reshard makes this true
        return content


def _reshard(path: Path, rank: int, saved_world_size: int, world_size: int) -> dict[str, Any]:
    """The optimiser file that ``rank`` of ``world_size`` would have written.

    ZeRO-2 lays the parameters of a group one after another, pads the end and cuts it evenly over the ranks. So the
    saved parts are joined without their padding and cut anew.
    """
    prefix = path.name[: path.name.index("zero_pp_rank_")]
    parts = [
        load_file(path.with_name(f"{prefix}zero_pp_rank_{number}_mp_rank_00_optim_states.pt"))["optimizer_state_dict"]
        for number in range(saved_world_size)
    ]
    result = dict(parts[0])
    masters = [
        [part["single_partition_of_fp32_groups"][g] for part in parts] for g in range(len(parts[0]["group_paddings"]))
    ]
    result["single_partition_of_fp32_groups"] = [_own_part(group, rank, world_size, pad=False) for group in masters]
    states: dict[int, dict[str, Any]] = {}
    for number, first in parts[0]["base_optimizer_state"]["state"].items():
        lengths = [len(master) for master in masters[number]]
        states[number] = {}
        for name, value in first.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                pieces = [part["base_optimizer_state"]["state"][number][name] for part in parts]
                unpadded = [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]
                states[number][name] = _own_part(unpadded, rank, world_size, pad=True)
            else:
                states[number][name] = value
    result["base_optimizer_state"] = {**parts[0]["base_optimizer_state"], "state": states}
    return {"optimizer_state_dict": result}


def _own_part(pieces: list[Tensor], rank: int, world_size: int, *, pad: bool) -> Tensor:
    whole = torch.cat(pieces)
    alignment = _ALIGNMENT_PER_RANK * world_size
    length = -(-len(whole) // alignment) * alignment // world_size
    part = whole[rank * length : (rank + 1) * length]
    return torch.nn.functional.pad(part, (0, length - len(part))) if pad else part.clone()


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        """Use a folder, which is made when something is saved.

        Args:
            keep_last: older ones are deleted; 0 keeps all.
        """
        self.folder, self._keep_last = folder, keep_last

    def save(self, engine: Any, state: TrainState) -> Path:
        """Save on all ranks. When it returns, the checkpoint is complete on disk.

        Raises:
            CheckpointError: on all ranks, if one could not write; earlier checkpoints stay as they are.
        """
        name = f"step{state.step:07d}"
        temporary, final = self.folder / f"{_UNFINISHED}{name}", self.folder / name
        self._on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        files = CheckpointFiles()
        engine.checkpoint_engine = files
        try:
            engine.save_checkpoint(
                str(self.folder),
                tag=temporary.name,
                client_state={"step": state.step, "pairs_seen": state.pairs_seen},
                save_latest=False,
            )
        except OSError as error:
            files.errors.append(f"rank {dist.rank()} could not write to {self.folder}: {error}")
        own = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files.written}
        reports = dist.gather_objects((own, files.errors))
        self._raise_together([message for _, errors in reports for message in errors], temporary)

        def publish() -> None:
            description = {
                "format_version": _FORMAT_VERSION,
                "step": state.step,
                "pairs_seen": state.pairs_seen,
                "world_size": dist.world_size(),
                "files": {file: facts for report, _ in reports for file, facts in report.items()},
            }
            write_atomically(temporary / COMPLETE_NAME, json.dumps(description, indent=1).encode() + b"\n")
            if final.exists():  # an earlier life of this run came as far and was resumed from before it
                _remove(final)
            os.replace(temporary, final)
            _flush_folder(self.folder)
            write_atomically(self.folder / "latest", name.encode())
            self._prune(state.step)

        self._on_first_rank(publish)
        return final

    def _prune(self, newest_step: int) -> None:
        """Delete what is too old, and what is of a later step: the run came back to before that, as it was damaged."""
        found = list(self._candidates())
        for path, step in found:
            if step > newest_step:
                _remove(path)
        own = [path for path, step in found if step <= newest_step]
        for old in own[self._keep_last :] if self._keep_last else []:
            _remove(old)

    def _candidates(self) -> Iterator[tuple[Path, int]]:
        """Folders that claim to be complete, newest first."""
        if not self.folder.is_dir():
            return
        found = [
            (path, int(match[1])) for path in self.folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))
        ]
        yield from sorted(found, key=lambda pair: -pair[1])

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose files are all what they were when it was written, on every rank the same.

        A damaged one is passed over with a warning. None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none is good.
        """
        candidates = dist.from_first_rank([path for path, _ in self._candidates()])
        faults = []
        for path in candidates:
            fault = verify(path)
            if fault is None:
                return Path(path)
            faults.append(fault)
            if dist.rank() == 0:
                logger.warning("%s Falling back to the checkpoint before it.", fault)
        if faults:
            raise CheckpointError(
                f"No checkpoint in {self.folder} is intact:\n  "
                + "\n  ".join(faults)
                + "\nDelete the folder to start from the beginning, or give a checkpoint of another run: --resume=PATH."
            )
        return None

    def load(self, engine: Any, path: Path) -> TrainState:
        """Restore weights, optimiser and schedule on all ranks, whatever the world size it was saved at."""
        description = read_description(path)
        files = CheckpointFiles()
        files.saved_world_size = description["world_size"]
        engine.checkpoint_engine = files
        engine.load_checkpoint(str(path.parent), tag=path.name)
        return TrainState(step=description["step"], pairs_seen=description["pairs_seen"])

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Do something to the folder on rank 0 while the others wait; a failure is everyone's."""
        fault = dist.on_first_rank(action)
        self._raise_together([fault] if fault else [])

    def _raise_together(self, errors: list[str], leftover: Path | None = None) -> None:
        if not errors:
            return
        if leftover is not None and dist.rank() == 0:
            shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
        raise CheckpointError(
            f"The checkpoint could not be saved: {'; '.join(errors[:3])}. {free / 2**30:.1f} GiB are free there. "
            "Earlier checkpoints are intact: make room (or lower checkpoint.keep_last) and run the same command again."
        )


def read_description(path: Path) -> dict[str, Any]:
    """The COMPLETE.json of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another version.
    """
    try:
        description: dict[str, Any] = json.loads((path / COMPLETE_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: no readable {COMPLETE_NAME} ({error}).") from error
    if description.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description.get('format_version')!r}, this program reads {_FORMAT_VERSION}."
        )
    return description


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks share the reading and all get the same answer."""
    fault: str | None = None
    try:
        files = sorted(read_description(path)["files"].items())
        for number, (name, facts) in enumerate(files):
            file = path / name
            if not file.is_file():
                fault = f"{file} is missing."
            elif file.stat().st_size != facts["bytes"]:
                fault = f"{file} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}."
            elif number % dist.world_size() == dist.rank() and sha256_of(file) != facts["sha256"]:
                fault = f"{file} does not have the content it was written with."
            if fault:
                break
    except CheckpointError as error:
        fault = str(error)
    return next((found for found in dist.gather_objects(fault) if found), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for.

    Raises:
        CheckpointError: neither, or nothing intact in it.
    """
    if (path / COMPLETE_NAME).is_file():
        fault = verify(path)
        if fault:
            raise CheckpointError(fault)
        return path
    newest = Checkpoints(path / "checkpoints", 0).newest_good()
    if newest is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint (a folder with {COMPLETE_NAME}) nor a run folder with checkpoints in it."
        )
    return newest


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The module's weights in the precision they are computed with, by name."""
    weights: dict[str, Tensor] = load_file(checkpoint / _WEIGHTS_FILE)["module"]
    return weights


def load_master_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in the float32 that the optimiser keeps them in; bfloat16 ones are these, rounded.

    Raises:
        CheckpointError: the files do not fit each other.
    """
    content = load_file(checkpoint / _WEIGHTS_FILE)
    files = sorted(
        (int(match[1]), path) for path in checkpoint.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))
    )
    states = [load_file(path)["optimizer_state_dict"] for _, path in files]
    weights: dict[str, Tensor] = {name: value.float() for name, value in content["module"].items()}
    for number, shapes in enumerate(content["param_shapes"]):
        # Without padding, and in the order of the group's parameters.
        flat = torch.cat([state["single_partition_of_fp32_groups"][number] for state in states]).float()
        if len(flat) != sum(shape.numel() for shape in shapes.values()):
            raise CheckpointError(
                f"The optimiser files of {checkpoint} hold {len(flat):,} weights of group {number}, the model has "
                f"{sum(shape.numel() for shape in shapes.values()):,}: a file is missing or of another run. Use an "
                "earlier checkpoint."
            )
        offset = 0
        for name, shape in shapes.items():
            weights[name] = flat[offset : offset + shape.numel()].view(shape).clone()
            offset += shape.numel()
    return weights


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that at no moment half of it looks whole."""
    (folder / COMPLETE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
