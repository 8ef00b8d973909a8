"""What the model is given at any step, without training: ``python pretrain/trace.py PRESET --from_step=90000``.

Answers "what did it see when the loss jumped": the order is a function of the seed and the position, so it is computed,
not looked up.
"""

from __future__ import annotations

import sys

import fire
import torch
from fire.decorators import SetParseFn
from torch.utils.data import Dataset

from bridgetower.config.cli import config_from_cli, parse_bool, parse_whole, run_command
from bridgetower.config.run import RunConfig
from bridgetower.data.corpora import open_corpora
from bridgetower.data.loader import prepare_items
from bridgetower.data.order import cut_global_batch
from bridgetower.data.stream import PretrainStream
from bridgetower.errors import ConfigError
from pretrain.presets import PRESETS

_FLAGS = {
    "from_step": "first optimiser step, counted from 1 as in metrics.jsonl (default 1)",
    "steps": "how many steps (default 1)",
    "world_size": "ranks of the run (default 1)",
    "rank": "one rank alone (default all: the global batch in its order)",
    "workers": "processes that read (default 0: this one)",
    "decode": "decode the pictures too, so that data.on_bad_sample=replace shows what it replaces (default false)",
}
USAGE = (
    "Usage: python pretrain/trace.py PRESET|RUN.json [flags] [--section.field=value ...]\n\n"
    "Prints a line of JSON for each pair: where it stands and lies, its caption, which tokens are masked, whether it\n"
    "is shown with its own image for ITM, and if not, with which.\n\n"
    "Flags:\n" + "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
)


class _Lines(Dataset[list[str]]):
    """The lines of micro-batches, by their number."""

    def __init__(self, stream: PretrainStream, decodes: bool) -> None:
        self._stream, self._decodes = stream, decodes

    def __getitem__(self, micro_step: int) -> list[str]:
        stream, side = self._stream, self._stream.image_size_px
        pixels = torch.empty(stream.max_images, 3, side, side, dtype=torch.uint8) if self._decodes else None
        return stream.describe_pairs(micro_step, stream.draw(micro_step, pixels))


def main(preset: str = "", *unexpected: str, **given: str) -> None:
    """Print the pairs of some steps of ``preset`` with dotted overrides."""
    flags = {name: given.pop(name) for name in _FLAGS if name in given}
    config = config_from_cli(PRESETS, preset, unexpected, given, USAGE)
    numbers = {name: parse_whole(name, flags.get(name, default), least) for name, default, least in _NUMBERS}
    decodes = parse_bool("decode", flags.get("decode", "false"))
    world_size = numbers["world_size"]
    ranks = range(world_size)
    if "rank" in flags:
        rank = parse_whole("rank", flags["rank"], 0)
        if rank >= world_size:
            raise ConfigError(f"--rank={rank} is not one of the {world_size} rank(s) of --world_size, counted from 0.")
        ranks = range(rank, rank + 1)
    streams = [_Lines(_stream(config, world_size, rank), decodes) for rank in ranks]
    cut = streams[0]._stream.cut
    first = (numbers["from_step"] - 1) * cut.accumulation_steps
    end = first + numbers["steps"] * cut.accumulation_steps
    workers, prefetch = numbers["workers"], config.data.prefetch_batches
    turns = [prepare_items(lines, first, end, workers=workers, prefetch=prefetch) for lines in streams]
    try:
        for of_ranks in zip(*turns, strict=True):
            for lines in of_ranks:
                print("\n".join(lines))
    except BrokenPipeError:  # as of `| head`
        sys.stderr.close()


_NUMBERS = (("from_step", "1", 1), ("steps", "1", 1), ("world_size", "1", 1), ("workers", "0", 0))


def _stream(config: RunConfig, world_size: int, rank: int) -> PretrainStream:
    data = config.data
    corpora = open_corpora(data.train_shards, data)
    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, world_size, data.negative_group_size)
    # These take seconds to import, for the towers' sizes.
    from bridgetower.run.prepare import build_tokenizer
    from pretrain import assemble_data

    config = assemble_data.complete(config)
    return assemble_data.build_stream(config, corpora, cut, rank, build_tokenizer(config.model))


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
