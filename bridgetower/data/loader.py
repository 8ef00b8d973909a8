"""Prepares micro-batches ahead of time: the same for any number of workers."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import math
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bridgetower.batch import FinetuneBatch, PretrainBatch
from bridgetower.data.stream import PairStream
from bridgetower.errors import BridgeTowerError, ConfigError, DataError, TrainingError
from bridgetower.shards.prefetch import Prefetcher

# A worker that is stuck for so long, in a file system that does not answer, shows where and ends itself.
_WORKER_TIMEOUT_SECONDS = 600
# The share of bad pairs is taken of at least so many.
_MIN_PAIRS = 10_000

_SHARED_MEMORY = Path("/dev/shm")

Item = TypeVar("Item")
Batch = TypeVar("Batch", PretrainBatch, FinetuneBatch)

logger = logging.getLogger("bridgetower.data")


class _WorkerView(Dataset[Item | BridgeTowerError], Generic[Item]):
    """A data set as a worker reads it: its errors are handed over as values.

    A raised one would arrive as a new error whose text is the worker's traceback.
    """

    def __init__(self, items: Dataset[Item]) -> None:
        self._items, self._timeout_seconds = items, _WORKER_TIMEOUT_SECONDS

    def __getitem__(self, number: int) -> Item | BridgeTowerError:
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        try:
            return self._items[number]
        except BridgeTowerError as error:
            return error
        finally:
            faulthandler.cancel_dump_traceback_later()


def prepare_items(items: Dataset[Item], first: int, end: int, *, workers: int, prefetch: int) -> Iterator[Item]:
    """Items ``first`` to ``end`` of a data set, in order.

    Args:
        workers: processes that prepare whole items ahead of time; 0 prepares each when it is asked for.
        prefetch: items that each worker keeps ready.

    Raises:
        BridgeTowerError: of the first item that cannot be prepared.
        TrainingError: a worker died.
    """
    if workers:
        # The server imports torch once, and workers share its memory: half a gigabyte each, and seconds of a core,
        # otherwise. Python before 3.12.8 does not preload the main program as it says (cpython issue 126631).
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    loader = DataLoader(
        _WorkerView(items) if workers else items,
        batch_size=None,
        sampler=range(first, end),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        # Workers start from a clean server process: a fork of a process with NCCL, gloo or CUDA threads can hang.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_prepare_worker,
        # With a timeout DataLoader would look only then whether its workers live; without one every 5 s.
        timeout=0,
    )
    ready = iter(loader)
    while True:
        try:
            item = next(ready)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not workers or "Caught" in str(error):  # raised by the worker's code, not by its death
                raise
            raise TrainingError(
                f"A process that prepares batches died ({error}): for want of memory, or stuck in a read, which it "
                "then said above. The run goes on from its last checkpoint with --resume=auto; with fewer processes "
                f"(--data.workers={workers} now) it needs less memory."
            ) from error
        if isinstance(item, BridgeTowerError):
            raise item
        yield item


class _InRing(NamedTuple):
    """A batch whose images lie in shared memory, so that they need not be sent."""

    ring: int
    slot: int
    num_images: int
    kind: type[Any]
    parts: list[Any]
    """The rest of the batch, tensors as arrays: sent as tensors, each would be a file that is opened and mapped."""

    def taken(self) -> Any:
        """The batch, in the process that has the ring."""
        parts: list[Any] = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in self.parts]
        return self.kind(_rings[self.ring][self.slot, : self.num_images], *parts)


# Rings of this process by number.
_rings: dict[int, Tensor] = {}
_ring_numbers = itertools.count()


class _RingWriter(Dataset[_InRing], Generic[Batch]):
    """A stream as a worker reads it: it decodes images to where the training process sees them."""

    def __init__(self, stream: PairStream[Batch], number: int) -> None:
        self._stream: PairStream[Batch] = stream
        self._number, self._ring = number, _rings[number]

    def __getitem__(self, micro_step: int) -> _InRing:
        slot = micro_step % len(self._ring)
        batch = self._stream.into(self._ring[slot], micro_step)
        pixels_N3SS, *rest = batch
        parts = [part.numpy() if isinstance(part, Tensor) else part for part in rest]
        return _InRing(self._number, slot, len(pixels_N3SS), type(batch), parts)


def micro_batches(stream: PairStream[Batch], first: int, end: int, *, pin_memory: bool = False) -> Iterator[Batch]:
    """Micro-batches ``first`` to ``end`` of a stream, as data.workers and data.on_bad_sample ask.

    The images of a batch may be overwritten when the next batch but one is asked for.

    Args:
        pin_memory: put them into page-locked memory, for copies to a GPU that do not wait.

    Raises:
        ConfigError: shared memory is too small.
        DataError: of the first micro-batch that cannot be read; or too many pairs could not.
        TrainingError: a worker died.
    """
    config = stream.config
    batches = _from_workers(stream, first, end, pin_memory) if config.workers else _read_here(stream, first, end)
    if stream.corpora.is_remote:
        batches = _fetching_ahead(batches, stream, first)
    if config.on_bad_sample == "replace":
        batches = _counting_bad(batches, config.max_bad_fraction)
    return batches


def _read_here(stream: PairStream[Batch], first: int, end: int) -> Iterator[Batch]:
    side = stream.image_size_px
    pixels = torch.empty(2, stream.max_images, 3, side, side, dtype=torch.uint8)
    return (stream.into(pixels[micro_step % 2], micro_step) for micro_step in range(first, end))


def _from_workers(stream: PairStream[Batch], first: int, end: int, pin_memory: bool) -> Iterator[Batch]:
    """Workers write images into a ring of shared memory: a new piece for each batch would cost as much as decoding."""
    config, side, number = stream.config, stream.image_size_px, next(_ring_numbers)
    # When batch n is handed over, n + workers * prefetch_batches is begun; n itself and the one before stay whole.
    slots = config.workers * config.prefetch_batches + 2
    shape = (slots, stream.max_images, 3, side, side)
    _check_shared_memory(math.prod(shape))
    ring = torch.empty(shape, dtype=torch.uint8)
    ring.share_memory_()
    _rings[number] = ring
    try:
        for item in prepare_items(
            _RingWriter(stream, number),
            first,
            end,
            workers=config.workers,
            prefetch=config.prefetch_batches,
        ):
            batch: Batch = item.taken()
            yield _pinned(batch) if pin_memory else batch
    finally:
        del _rings[number]


def _pinned(batch: Batch) -> Batch:
    parts: list[Any] = [part.pin_memory() if isinstance(part, Tensor) else part for part in batch]
    return type(batch)(*parts)


def _check_shared_memory(num_bytes: int) -> None:
    """What does not fit is not refused by the system when it is asked for: the process that writes to it is killed."""
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else num_bytes
    if free < num_bytes:
        raise ConfigError(
            f"Workers need {num_bytes / 1e6:,.0f} MB of shared memory for their batches, but {_SHARED_MEMORY} has "
            f"{free / 1e6:,.0f} MB free. Enlarge it (docker run --shm-size=8g), or lower data.workers or "
            "data.prefetch_batches."
        )


def record_pairs(batches: Iterator[PretrainBatch], file: Path) -> Iterator[PretrainBatch]:
    """Write the lines of each batch when it is handed on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for batch in batches:
            stream.writelines(f"{line}\n" for line in batch.lines)
            stream.flush()
            yield batch


def _fetching_ahead(batches: Iterator[Batch], stream: PairStream[Batch], first: int) -> Iterator[Batch]:
    """Fetch the shards of the window that is read and of the next one while batches go by."""
    assert stream.corpora.cache is not None
    prefetcher = Prefetcher(stream.corpora.cache, stream.corpora.remote)
    window: list[int] = []
    try:
        for micro_step in range(first, first + 2**62):
            position = int(stream.cut.positions(micro_step, stream.rank)[0])
            here = stream.order.shards_of(position, 1)
            if here != window:
                window = here
                both: list[int] = stream.order.shards_of(position, 2)
                # The ranks of a node share the work: each begins at another shard.
                turn: int = stream.rank % len(both)
                prefetcher.advance([*both[turn:], *both[:turn]], keep=window)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
    finally:
        prefetcher.close()


def _counting_bad(batches: Iterator[Batch], max_fraction: float) -> Iterator[Batch]:
    """Name each pair that was replaced, and stop when there are too many."""
    num_pairs = num_replaced = 0
    for batch in batches:
        num_pairs += len(batch.replaced_B)
        num_replaced += len(batch.notes)
        for note in batch.notes:
            logger.warning("replaced a pair that cannot be read (%d of %d so far): %s", num_replaced, num_pairs, note)
        if num_replaced > max_fraction * max(num_pairs, _MIN_PAIRS):
            raise DataError(
                f"{num_replaced:,} of {num_pairs:,} pairs could not be read and were replaced, more than "
                f"data.max_bad_fraction={max_fraction} of {max(num_pairs, _MIN_PAIRS):,}. The last: {batch.notes[-1:]} "
                "Check the shards with data_prep/check_shards.py; a higher fraction goes on without them."
            )
        yield batch


def _as_it_is(item: Item) -> Item:
    return item


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
