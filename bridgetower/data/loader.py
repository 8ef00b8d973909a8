"""The stream of training micro-batches: numbers in, ready batches out, the same for any number of workers."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bridgetower import draws
from bridgetower.batch import PretrainBatch
from bridgetower.data import collate
from bridgetower.data.corpora import Corpora, as_int64
from bridgetower.data.images import load_image
from bridgetower.data.order import Cut, Order
from bridgetower.data.text import Tokenizer, pad
from bridgetower.errors import BridgeTowerError, TrainingError

# A worker that is stuck for so long, in a file system that does not answer, shows where and ends itself.
_WORKER_TIMEOUT_SECONDS = 600


class PretrainStream(Dataset[PretrainBatch]):
    """Micro-batch n of one rank, as a pure function of n."""

    def __init__(
        self,
        corpora: Corpora,
        order: Order,
        cut: Cut,
        *,
        rank: int,
        seed: int,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
        mlm_probability: float,
        negative_group_size: int,
    ) -> None:
        """Describe the stream; nothing is read yet."""
        self.corpora, self.order, self.cut, self.rank, self.seed = corpora, order, cut, rank, seed
        self.tokenizer = tokenizer
        self.image_size_px, self.max_text_tokens = image_size_px, max_text_tokens
        self.mlm_probability, self.negative_group_size = mlm_probability, negative_group_size

    def __getitem__(self, micro_step: int) -> PretrainBatch:
        """Read, decode and collate one micro-batch. Micro-steps count from the start of the run."""
        positions_B = self.cut.positions(micro_step, self.rank)
        pairs = self.corpora.read(self.order.locate(positions_B))
        ids_BL = pad(
            self.tokenizer.encode([pair.caption for pair in pairs], self.max_text_tokens), self.tokenizer.pad_id
        )
        masked = collate.mask_tokens(
            ids_BL,
            positions_B,
            self.tokenizer,
            stream=draws.key(self.seed, "mlm"),
            probability=self.mlm_probability,
        )
        image_id_B = np.array([pair.image_id for pair in pairs], np.uint64)
        choice = collate.choose_images(
            image_id_B,
            np.array([pair.corpus for pair in pairs]),
            positions_B,
            seed=self.seed,
            group_size=self.negative_group_size,
        )
        weight_M = collate.mlm_weights(masked.index_M, ids_BL.shape[1], len(pairs), self.negative_group_size)
        return PretrainBatch(
            pixels_B3SS=torch.stack([load_image(pair.image, self.image_size_px, pair.where) for pair in pairs]),
            clean_ids_BL=torch.from_numpy(ids_BL),
            masked_ids_BL=torch.from_numpy(masked.ids_BL),
            attention_mask_BL=torch.from_numpy(ids_BL != self.tokenizer.pad_id),
            mlm_index_M=torch.from_numpy(masked.index_M),
            mlm_label_M=torch.from_numpy(masked.label_M),
            mlm_weight_M=torch.from_numpy(weight_M),
            itm_image_B=torch.from_numpy(choice.image_B),
            itm_label_B=torch.from_numpy(choice.label_B),
            image_id_B=torch.from_numpy(as_int64(image_id_B)),
        )


class _WorkerView(Dataset[PretrainBatch | BridgeTowerError]):
    """A stream as a worker reads it: its errors are handed over as values.

    A raised one would arrive as a new error whose text is the worker's traceback.
    """

    def __init__(self, stream: PretrainStream) -> None:
        self._stream = stream

    def __getitem__(self, micro_step: int) -> PretrainBatch | BridgeTowerError:
        faulthandler.dump_traceback_later(_WORKER_TIMEOUT_SECONDS, exit=True)
        try:
            return self._stream[micro_step]
        except BridgeTowerError as error:
            return error
        finally:
            faulthandler.cancel_dump_traceback_later()


def micro_batches(
    stream: PretrainStream, first: int, end: int, *, workers: int, prefetch_batches: int, pin_memory: bool
) -> Iterator[PretrainBatch]:
    """Micro-batches ``first`` to ``end`` of a stream, in order.

    Args:
        workers: processes that prepare whole micro-batches ahead of time; 0 prepares each when it is asked for.
        prefetch_batches: micro-batches that each worker keeps ready.
        pin_memory: put them into page-locked memory, for copies to a GPU that do not wait.

    Raises:
        DataError: of the first micro-batch that cannot be read.
        TrainingError: a worker died.
    """
    loader = DataLoader(
        _WorkerView(stream) if workers else stream,
        batch_size=None,
        sampler=range(first, end),
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        # Workers start from a clean server process: a fork of a process with NCCL, gloo or CUDA threads can hang.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_prepare_worker,
        # With a timeout DataLoader would look only then whether its workers live; without one every 5 s.
        timeout=0,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
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
        if isinstance(batch, BridgeTowerError):
            raise batch
        yield batch


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
