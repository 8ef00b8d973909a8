"""Show what the model is given at any step, without training: ``python pretrain/trace.py PRESET --from_step=90000``.

Answers "which pairs did the model see when the loss jumped". Order, masks and negatives depend only on the seed and the
position in the stream, so they are computed and nothing needs to have been recorded.
"""

from __future__ import annotations

import sys

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, importing, parse_bool, parse_whole, run_command
from bridgetower.errors import ConfigError
from pretrain.presets import PRESETS

_FLAGS = {
    "from_step": "first optimizer step, counted from 1 as in metrics.jsonl (default 1)",
    "steps": "number of steps (default 1)",
    "world_size": "number of ranks of the run (default 1)",
    "rank": "show the pairs of this rank only (default: the whole global batch in its order)",
    "workers": "number of processes that read ahead (default 0: this process reads)",
    "decode": "also decode the images, to show what data.on_bad_sample=replace puts in (default false)",
}
_WHOLE_NUMBERS = (("from_step", "1", 1), ("steps", "1", 1), ("world_size", "1", 1), ("workers", "0", 0))
"""Name, default and minimum of each flag that is a whole number."""

USAGE = (
    "Usage: python pretrain/trace.py PRESET|RUN.json [flags] [--section.field=value ...]\n\n"
    "Prints one line of JSON per pair: its position in the stream, its shard and key, its caption, which tokens are\n"
    "masked, whether ITM shows it with its own image, and if not, whose image it gets.\n\n"
    "Flags:\n" + "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
)


def main(preset: str = "", *unexpected: str, **given: str) -> None:
    """Print the pairs of some steps of ``preset`` with dotted overrides."""
    flags = {name: given.pop(name) for name in _FLAGS if name in given}
    config = config_from_cli(PRESETS, preset, unexpected, given, USAGE)
    numbers = {name: parse_whole(name, flags.get(name, default), minimum) for name, default, minimum in _WHOLE_NUMBERS}
    decode = parse_bool("decode", flags.get("decode", "false"))
    world_size = numbers["world_size"]
    ranks = range(world_size)
    if "rank" in flags:
        rank = parse_whole("rank", flags["rank"], 0)
        if rank >= world_size:
            raise ConfigError(
                f"--rank={rank} does not exist: ranks are counted from 0, and --world_size={world_size}. Give a rank "
                f"below {world_size}, or the run's number of ranks as --world_size."
            )
        ranks = range(rank, rank + 1)
    with importing():  # torch: behind the checks of the command line, which do not need it
        from pretrain.trace_lines import trace_lines

    lines = trace_lines(
        config,
        from_step=numbers["from_step"],
        num_steps=numbers["steps"],
        world_size=world_size,
        ranks=ranks,
        workers=numbers["workers"],
        decode=decode,
    )
    try:
        for line in lines:
            print(line)
    except BrokenPipeError:  # the reader has seen enough, e.g. `| head`
        sys.stderr.close()


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
