"""Preparation of micro-batches ahead of time, in worker processes. Their number does not change any batch."""

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

# A worker whose read takes longer than this, in a file system that does not answer, prints its stack and exits.
_WORKER_TIMEOUT_SECONDS = 600
# The fraction of bad pairs is computed over at least this many pairs.
_MIN_COUNTED_PAIRS = 10_000

_SHARED_MEMORY = Path("/dev/shm")

Item = TypeVar("Item")
Batch = TypeVar("Batch", PretrainBatch, FinetuneBatch)

logger = logging.getLogger("bridgetower.data")


class _WorkerView(Dataset[Item | BridgeTowerError], Generic[Item]):
    """A data set in a worker process. It returns errors made for people as values.

    DataLoader would replace a raised error with a new one whose text is the worker's traceback.
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
    """Yield items ``first`` to ``end`` (exclusive) of a data set, in order.

    Args:
        workers: number of processes that prepare whole items ahead of time; 0 prepares each item here, when it is due.
        prefetch: number of items that each worker keeps ready.

    Raises:
        BridgeTowerError: the error of the first item that could not be prepared.
        TrainingError: a worker died.
    """
    if workers:
        # The fork server imports torch once, which saves each worker half a gigabyte and seconds of CPU time. This
        # module is named, as Python before 3.12.8 does not preload the main program as documented (cpython issue
        # 126631).
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    loader = DataLoader(
        _WorkerView(items) if workers else items,
        batch_size=None,
        sampler=range(first, end),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_identity,
        # Workers are forked from a clean server: a fork of a process with NCCL, gloo or CUDA threads can hang.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_prepare_worker,
        # Without a timeout DataLoader checks every 5 s that its workers live; with one, only when it expires.
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
                f"A process that prepares batches died ({error}). It ran out of memory, or a read hung (see the "
                "message above). Use --resume=auto to continue from the last checkpoint, and fewer processes than "
                f"--data.workers={workers} to save memory."
            ) from error
        if isinstance(item, BridgeTowerError):
            raise item
        yield item


class _InRing(NamedTuple):
    """A batch on its way from a worker. Its images are in a ring of shared memory and need not be sent."""

    ring: int
    slot: int
    num_images: int
    batch_type: type[Any]
    fields: list[Any]
    """Other fields of the batch, tensors as arrays: sent as a tensor, each would be a shared file to open and map."""

    def to_batch(self) -> Any:
        """Return the batch, in the process that owns the ring."""
        fields: list[Any] = [
            torch.from_numpy(field) if isinstance(field, np.ndarray) else field for field in self.fields
        ]
        return self.batch_type(_rings[self.ring][self.slot, : self.num_images], *fields)


# Rings of shared memory that this process owns: slots x images, shape (slots, N, 3, S, S).
_rings: dict[int, Tensor] = {}
_ring_numbers = itertools.count()


class _RingWriter(Dataset[_InRing], Generic[Batch]):
    """A stream in a worker process. It decodes images into shared memory, where the training process reads them."""

    def __init__(self, stream: PairStream[Batch], ring_number: int) -> None:
        self._stream: PairStream[Batch] = stream
        self._ring_number, self._ring = ring_number, _rings[ring_number]

    def __getitem__(self, micro_step: int) -> _InRing:
        slot = micro_step % len(self._ring)
        batch = self._stream.read_into(self._ring[slot], micro_step)
        pixels_N3SS, *others = batch
        fields = [field.numpy() if isinstance(field, Tensor) else field for field in others]
        return _InRing(self._ring_number, slot, len(pixels_N3SS), type(batch), fields)


def micro_batches(stream: PairStream[Batch], first: int, end: int, *, pin_memory: bool = False) -> Iterator[Batch]:
    """Yield micro-batches ``first`` to ``end`` (exclusive) of a stream, prepared as its settings say.

    A batch's images stay valid until the next batch but one is requested, and may then be overwritten.

    Args:
        pin_memory: copy batches to page-locked memory, from which copies to a GPU are asynchronous.

    Raises:
        ConfigError: shared memory is too small for the workers.
        DataError: a pair cannot be read and data.on_bad_sample=fail, or more than data.max_bad_fraction were replaced.
        TrainingError: a worker died.
    """
    config = stream.config
    batches = _from_workers(stream, first, end, pin_memory) if config.workers else _read_here(stream, first, end)
    if stream.corpora.is_remote:
        batches = _fetch_ahead(batches, stream, first)
    if config.on_bad_sample == "replace":
        batches = _count_replaced(batches, config.max_bad_fraction)
    return batches


def _read_here(stream: PairStream[Batch], first: int, end: int) -> Iterator[Batch]:
    side = stream.image_size_px
    pixels = torch.empty(2, stream.max_images, 3, side, side, dtype=torch.uint8)
    return (stream.read_into(pixels[micro_step % 2], micro_step) for micro_step in range(first, end))


def _from_workers(stream: PairStream[Batch], first: int, end: int, pin_memory: bool) -> Iterator[Batch]:
    """Read with workers, which write images into a ring of shared memory.

    Allocating and mapping new shared memory for each batch would cost as much as decoding its images.
    """
    config, side, ring_number = stream.config, stream.image_size_px, next(_ring_numbers)
    # When batch n is yielded, a worker starts batch n + workers * prefetch_batches. Two more slots keep n and n - 1
    # intact.
    slots = config.workers * config.prefetch_batches + 2
    shape = (slots, stream.max_images, 3, side, side)
    _check_shared_memory(math.prod(shape))
    ring = torch.empty(shape, dtype=torch.uint8)
    ring.share_memory_()
    _rings[ring_number] = ring
    try:
        for item in prepare_items(
            _RingWriter(stream, ring_number),
            first,
            end,
            workers=config.workers,
            prefetch=config.prefetch_batches,
        ):
            batch: Batch = item.to_batch()
            yield _pin(batch) if pin_memory else batch
    finally:
        del _rings[ring_number]


def _pin(batch: Batch) -> Batch:
    fields: list[Any] = [field.pin_memory() if isinstance(field, Tensor) else field for field in batch]
    return type(batch)(*fields)


def _check_shared_memory(num_bytes: int) -> None:
    """Raise ConfigError if shared memory is too small.

    The system grants any size at first, and kills the process that later writes to memory that does not exist.
    """
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else num_bytes
    if free < num_bytes:
        raise ConfigError(
            f"Workers need {num_bytes / 1e6:,.0f} MB of shared memory for their batches, but {_SHARED_MEMORY} has "
            f"{free / 1e6:,.0f} MB free. Enlarge it (docker run --shm-size=8g), or lower data.workers or "
            "data.prefetch_batches."
        )


def record_pairs(batches: Iterator[PretrainBatch], file: Path) -> Iterator[PretrainBatch]:
    """Write each batch's ``lines`` to a file when the batch is yielded."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for batch in batches:
            stream.writelines(f"{line}\n" for line in batch.lines)
            stream.flush()
            yield batch


def _fetch_ahead(batches: Iterator[Batch], stream: PairStream[Batch], first: int) -> Iterator[Batch]:
    """Fetch the shards of the current window and of the next one in the background while batches are yielded."""
    assert stream.corpora.cache is not None
    prefetcher = Prefetcher(stream.corpora.cache, stream.corpora.remote)
    window: list[int] = []
    try:
        for micro_step in range(first, first + 2**62):
            position = int(stream.cut.positions(micro_step, stream.rank)[0])
            current = stream.order.shards_from(position, 1)
            if current != window:
                window = current
                upcoming: list[int] = stream.order.shards_from(position, 2)
                # The ranks of a node share the work: each starts with another shard.
                start: int = stream.rank % len(upcoming)
                prefetcher.advance([*upcoming[start:], *upcoming[:start]], keep=window)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
    finally:
        prefetcher.close()


def _count_replaced(batches: Iterator[Batch], max_fraction: float) -> Iterator[Batch]:
    """Log each pair that was replaced, and stop when there are too many."""
    num_pairs = num_replaced = 0
    for batch in batches:
        num_pairs += len(batch.replaced_B)
        num_replaced += len(batch.notes)
        for note in batch.notes:
            logger.warning("replaced a pair that cannot be read (%d of %d so far): %s", num_replaced, num_pairs, note)
        counted_pairs = max(num_pairs, _MIN_COUNTED_PAIRS)
        if num_replaced > max_fraction * counted_pairs:
            raise DataError(
                f"{num_replaced:,} of {num_pairs:,} pairs could not be read and were replaced, more than "
                f"data.max_bad_fraction={max_fraction} of {counted_pairs:,}. The last: {batch.notes[-1:]} "
                "Check the shards with data_prep/check_shards.py; a higher fraction continues without them."
            )
        yield batch


def _identity(item: Item) -> Item:
    return item


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
