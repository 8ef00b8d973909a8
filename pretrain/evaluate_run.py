"""Score a run on held-out data: ``python pretrain/evaluate_run.py runs/demo``.

Also under deepspeed, torchrun and srun, with the same scores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import parse_whole, refuse_unknown, run_command, start_logging
from bridgetower.config.schema import RunConfig
from bridgetower.errors import ConfigError

USAGE = """Usage: python pretrain/evaluate_run.py RUN [flags]

RUN is a run folder (its newest good checkpoint is scored) or a checkpoint folder. The scores are printed and written
to eval.json and predictions.json of the run folder.

Flags:
  --eval_shards=A,B  held-out folders (default: those of the run); the first one gives the headline scores
  --max_images=N     of each, its first images with all their captions; 0 takes all (default: as in the run)
  --rerank_top_k=N   candidates that ITM scores again (default: as in the run)
  --batch_size=N     images, captions or pairs of one pass (default: as in the run)"""


@SetParseFn(str)
def main(
    run: str = "",
    *unexpected: str,
    eval_shards: str = "",
    max_images: str = "",
    rerank_top_k: str = "",
    batch_size: str = "",
    local_rank: str = "0",
    **unknown: str,
) -> None:
    """Evaluate a run. The deepspeed launcher adds ``local_rank``."""
    refuse_unknown(unexpected, unknown, ["eval_shards", "max_images", "rerank_top_k", "batch_size"], USAGE)
    if not run:
        raise ConfigError(f"Which run? {USAGE}")
    from bridgetower.engine import launch as launching
    from bridgetower.engine.checkpoint import find_checkpoint, read_description
    from bridgetower.engine.evaluate import write_scores
    from pretrain import assemble
    from pretrain.score_table import print_scores

    path = Path(run)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    config, precision = assemble.read_run(folder)
    numbers = {
        name: parse_whole(name, text, minimum)
        for name, text, minimum in (
            ("max_images", max_images, 0),
            ("rerank_top_k", rerank_top_k, 1),
            ("batch_size", batch_size, 1),
        )
        if text
    }
    config = _with_flags(config, tuple(part for part in eval_shards.split(",") if part), numbers)
    place = launching.read_launch()
    start_logging(place.rank)
    assemble.check_held_out(config.data.eval_shards)
    tokenizer = assemble.build_tokenizer(config)
    launching.start(place, config.engine.threads_per_rank)
    try:
        checkpoint = find_checkpoint(path)
        task = assemble.load_task(config, checkpoint, precision).to(place.device)
        results = assemble.evaluate_splits(task, assemble.build_splits(config, tokenizer), config, place.device)
        step = read_description(checkpoint)["step"]
        write_scores(folder, step, results)
        if place.rank == 0:
            print_scores(step, results)
    finally:
        launching.finish()


def _with_flags(config: RunConfig, eval_shards: tuple[str, ...], numbers: dict[str, int]) -> RunConfig:
    data = dataclasses.replace(config.data, eval_shards=eval_shards or config.data.eval_shards)
    if not data.eval_shards:
        raise ConfigError(f"The run {config.name} has no data.eval_shards. Give --eval_shards=DIR.")
    return dataclasses.replace(config, data=data, evaluation=dataclasses.replace(config.evaluation, **numbers))


if __name__ == "__main__":
    run_command(lambda: fire.Fire(main))
