"""The checkpoints of a run: published whole or not at all, verified before they are read, at any world size.

A checkpoint is written under a temporary name, flushed, described by COMPLETE.json (step, sizes, SHA-256) and then
renamed, so a folder named ``stepNNNNNNN`` is complete.
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

from bridgetower import dist
from bridgetower.engine.checkpoint_files import COMPLETE_NAME, FORMAT_VERSION, find_fault, read_description
from bridgetower.errors import CheckpointError
from bridgetower.io.files import sha256_of, write_atomically

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step(\d{7,})")
_UNFINISHED = "unfinished-"


@dataclass
class TrainState:
    """How far a run has come. Order, masks, negatives and dropout depend only on it, so there is no other state."""

    step: int = 0
    """Optimizer steps done."""
    pairs_seen: int = 0


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        """Use a folder. The first save makes it.

        Args:
            keep_last: number of checkpoints to keep, older ones are deleted; 0 keeps all.
        """
        self.folder, self._keep_last = folder, keep_last

    def save(self, engine: Any, state: TrainState) -> Path:
        """Save on all ranks. When it returns, the checkpoint is complete on disk.

        Raises:
            CheckpointError: on all ranks, if one of them could not write; earlier checkpoints stay as they are.
        """
        from bridgetower.engine.deepspeed_files import CheckpointFiles  # DeepSpeed, which readers need not import

        name = f"step{state.step:07d}"
        temporary, final = self.folder / f"{_UNFINISHED}{name}", self.folder / name
        self._on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        files = CheckpointFiles(dist.world_size())
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
        # Each rank hashes what it wrote; rank 0 gets the facts and publishes.
        facts = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files.written}
        reports = dist.gather_objects((facts, files.errors))
        self._raise_together([message for _, errors in reports for message in errors], temporary)
        facts = {file: file_facts for rank_facts, _ in reports for file, file_facts in rank_facts.items()}
        self._on_first_rank(lambda: self._publish(temporary, final, state, facts))
        return final

    def _publish(self, temporary: Path, final: Path, state: TrainState, facts: dict[str, dict[str, Any]]) -> None:
        """Describe a checkpoint whose files are all on disk, and give it its name.

        The order matters at each moment at which the machine may fail: the files are flushed before COMPLETE.json says
        that they are there, and the rename, which is atomic, comes after both. The folder is flushed before ``latest``
        names the checkpoint, and older checkpoints go only when it is safe.
        """
        description = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "pairs_seen": state.pairs_seen,
            "world_size": dist.world_size(),
            "files": facts,
        }
        write_atomically(temporary / COMPLETE_NAME, json.dumps(description, indent=1).encode() + b"\n")
        if final.exists():  # the run reached this step before, and was then resumed from an earlier one
            _remove(final)
        os.replace(temporary, final)
        _flush_folder(self.folder)
        write_atomically(self.folder / "latest", final.name.encode())
        self._prune(state.step)

    def _prune(self, newest_step: int) -> None:
        """Delete checkpoints that are too old, and those of later steps.

        There are later ones if they were damaged, so that the run was resumed from before them.
        """
        folders = list(self._list_folders())
        for path, step in folders:
            if step > newest_step:
                _remove(path)
        kept = [path for path, step in folders if step <= newest_step]
        for old in kept[self._keep_last :] if self._keep_last else []:
            _remove(old)

    def _list_folders(self) -> Iterator[tuple[Path, int]]:
        """Yield the folders whose names claim that they are complete, with their steps, newest first."""
        if not self.folder.is_dir():
            return
        folders = [
            (path, int(match[1])) for path in self.folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))
        ]
        yield from sorted(folders, key=lambda folder: -folder[1])

    def find_newest_intact(self) -> Path | None:
        """Find the newest checkpoint whose files have the content they were written with, the same on every rank.

        A damaged one is passed over with a warning.

        Returns: None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        folders = dist.from_first_rank([path for path, _ in self._list_folders()])
        faults = []
        for path in folders:
            fault = find_fault(path)
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
        """Restore weights, optimizer and schedule on all ranks, whatever the world size it was saved at."""
        from bridgetower.engine.deepspeed_files import CheckpointFiles

        description = read_description(path)
        engine.checkpoint_engine = CheckpointFiles(description["world_size"])
        engine.load_checkpoint(str(path.parent), tag=path.name)
        return TrainState(step=description["step"], pairs_seen=description["pairs_seen"])

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Change the folder on rank 0 while the others wait. If that fails, all ranks raise."""
        fault = dist.on_first_rank(action)
        self._raise_together([fault] if fault else [])

    def _raise_together(self, errors: list[str], leftover: Path | None = None) -> None:
        if not errors:
            return
        if leftover is not None and dist.rank() == 0:
            shutil.rmtree(leftover, ignore_errors=True)
        free_bytes = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
        raise CheckpointError(
            f"The checkpoint could not be saved: {'; '.join(errors[:3])}. {free_bytes / 2**30:.1f} GiB are free there. "
            "Earlier checkpoints are intact: free space (or lower checkpoint.keep_last) and run the same command again."
        )


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a run folder or a checkpoint folder stands for.

    Raises:
        CheckpointError: the folder is neither, or nothing in it is intact.
    """
    if (path / COMPLETE_NAME).is_file():
        fault = find_fault(path)
        if fault:
            raise CheckpointError(fault)
        return path
    newest = Checkpoints(path / "checkpoints", 0).find_newest_intact()
    if newest is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint (a folder with {COMPLETE_NAME}) nor a run folder with checkpoints in it."
        )
    return newest


def _remove(folder: Path) -> None:
    """Delete a checkpoint. COMPLETE.json goes first, so that a half-deleted folder never looks complete."""
    (folder / COMPLETE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, such as one that a rename has changed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
