"""What ``pretrain/trace.py`` prints: one line of JSON per pair, computed from the seed and the stream position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset

from bridgetower.config.run import RunConfig
from bridgetower.data.corpora import open_corpora
from bridgetower.data.loader import prepare_items
from bridgetower.data.order import cut_global_batch
from bridgetower.data.stream import PretrainStream
from bridgetower.run.prepare import build_tokenizer
from pretrain import assemble_data


class _TracedStream(Dataset[list[str]]):
    """The lines of each micro-batch, by its index in the stream."""

    def __init__(self, stream: PretrainStream, decode: bool) -> None:
        self._stream, self._decode = stream, decode

    def __getitem__(self, micro_step: int) -> list[str]:
        stream, side_px = self._stream, self._stream.image_size_px
        pixels = torch.empty(stream.max_images, 3, side_px, side_px, dtype=torch.uint8) if self._decode else None
        return stream.describe_pairs(micro_step, stream.draw(micro_step, pixels))


def trace_lines(
    config: RunConfig,
    *,
    from_step: int,
    num_steps: int,
    world_size: int,
    ranks: Sequence[int],
    workers: int,
    decode: bool,
) -> Iterator[str]:
    """Compute the lines of some steps, micro-step by micro-step, and within a micro-step rank by rank.

    Args:
        from_step: first optimizer step, counted from 1.
        ranks: those whose pairs are returned.
        workers: processes that compute the lines; 0 computes them in this process.
        decode: also decode the images, so that the lines name the pairs that replace unreadable ones.
    """
    data = config.data
    corpora = open_corpora(data.train_shards, data)
    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, world_size, data.negative_group_size)
    config = assemble_data.complete(config)
    tokenizer = build_tokenizer(config.model)
    first = (from_step - 1) * cut.accumulation_steps
    end = first + num_steps * cut.accumulation_steps
    micro_batches = [
        prepare_items(
            _TracedStream(assemble_data.build_stream(config, corpora, cut, rank, tokenizer), decode),
            first,
            end,
            workers=workers,
            prefetch=data.prefetch_batches,
        )
        for rank in ranks
    ]
    for lines_of_ranks in zip(*micro_batches, strict=True):
        for lines in lines_of_ranks:
            yield from lines
