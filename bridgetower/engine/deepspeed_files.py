"""How DeepSpeed writes and reads a checkpoint's files: safely, and at another world size than they were saved at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower import dist
from bridgetower.engine.checkpoint_files import OPTIMIZER_FILE, WEIGHTS_FILE, load_file
from bridgetower.engine.zero import CHECKPOINT_CLASSES, CheckpointEngine

# ZeRO-2 pads the flat buffer of a group to a multiple of this many elements per rank.
_ALIGNMENT_PER_RANK = 2


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Writes and reads single files for DeepSpeed, one per call."""

    def __init__(self, saved_world_size: int) -> None:
        """Prepare for one checkpoint.

        Args:
            saved_world_size: ranks that wrote, or write, the checkpoint.
        """
        super().__init__(None)
        self.zipfile_serialization = True
        self.written: list[Path] = []
        self.errors: list[str] = []
        self._saved_world_size = saved_world_size

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file and flush it to disk.

        An error is kept for later: if this rank raised it here, the others would wait for it in a collective.
        """
        try:
            torch.save(state_dict, path)
            with Path(path).open("rb") as file:
                os.fsync(file.fileno())
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self.errors.append(f"rank {dist.rank()} could not write {path}: {error}")

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read one file. An optimizer file of another world size is put together from all that were saved."""
        file = Path(path)
        match = OPTIMIZER_FILE.fullmatch(file.name)
        if match and self._saved_world_size != dist.world_size():
            return _reshard(file, int(match[1]), self._saved_world_size, dist.world_size())
        content: dict[str, Any] = load_file(file, CHECKPOINT_CLASSES)
        if file.name == WEIGHTS_FILE:
            # DeepSpeed refuses other world sizes; for `_reshard` this one is right.
            content["dp_world_size"] = dist.world_size()
        return content


def _reshard(path: Path, rank: int, saved_world_size: int, world_size: int) -> dict[str, Any]:
    """Build the optimizer file that ``rank`` of ``world_size`` ranks would have written.

    ZeRO-2 lays the parameters of a group one after another, pads the end and cuts the result evenly over the ranks. So
    the saved partitions are joined without their padding and cut anew. Master weights are saved without padding,
    optimizer states with it.
    """
    prefix = path.name[: path.name.index("zero_pp_rank_")]
    saved = [
        load_file(path.with_name(f"{prefix}zero_pp_rank_{old_rank}_mp_rank_00_optim_states.pt"), CHECKPOINT_CLASSES)
        for old_rank in range(saved_world_size)
    ]
    states = [content["optimizer_state_dict"] for content in saved]
    result = dict(states[0])
    masters = [
        [state["single_partition_of_fp32_groups"][group] for state in states]
        for group in range(len(states[0]["group_paddings"]))
    ]
    result["single_partition_of_fp32_groups"] = [
        _cut_partition(partitions, rank, world_size, pad=False) for partitions in masters
    ]
    moments: dict[int, dict[str, Any]] = {}
    for group, first in states[0]["base_optimizer_state"]["state"].items():
        lengths = [len(master) for master in masters[group]]
        moments[group] = {}
        for name, value in first.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                padded = [state["base_optimizer_state"]["state"][group][name] for state in states]
                partitions = [partition[:length] for partition, length in zip(padded, lengths, strict=True)]
                moments[group][name] = _cut_partition(partitions, rank, world_size, pad=True)
            else:
                moments[group][name] = value
    result["base_optimizer_state"] = {**states[0]["base_optimizer_state"], "state": moments}
    return {"optimizer_state_dict": result}


def _cut_partition(partitions: list[Tensor], rank: int, world_size: int, *, pad: bool) -> Tensor:
    """Join the partitions of all saved ranks and cut out the one of ``rank``.

    Args:
        pad: with zeros, to the length that every rank has.
    """
    whole = torch.cat(partitions)
    alignment = _ALIGNMENT_PER_RANK * world_size
    length = -(-len(whole) // alignment) * alignment // world_size
    partition = whole[rank * length : (rank + 1) * length]
    return torch.nn.functional.pad(partition, (0, length - len(partition))) if pad else partition.clone()
