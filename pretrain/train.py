"""Pretrain a BridgeTower: ``python pretrain/train.py PRESET --section.field=value``.

The same under plain python, deepspeed, torchrun and srun.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, importing, run_command, start_logging
from bridgetower.config.deepspeed import merge_deepspeed_config
from bridgetower.config.run import RunConfig
from bridgetower.config.snapshot import Identity, check_resume
from bridgetower.data.corpora import open_corpora
from bridgetower.data.order import cut_global_batch
from bridgetower.errors import EXIT_PREEMPTED
from pretrain.presets import DS_CONFIGS, PRESETS

if TYPE_CHECKING:
    from bridgetower.batch import PretrainBatch

USAGE = "Usage: python pretrain/train.py PRESET|RUN.json [--section.field=value ...]"


def main(preset: str = "", *unexpected: str, local_rank: str = "0", **overrides: str) -> None:
    """Train ``preset`` with dotted overrides. The deepspeed launcher adds ``local_rank``."""
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    if not run(config):
        sys.exit(EXIT_PREEMPTED)


def run(config: RunConfig) -> bool:
    """Train to the end, or until asked to stop; then a checkpoint is saved.

    Everything that can be wrong with settings and data is found before a process group or a GPU is touched.

    Returns: True if it came to the end.
    """
    data = config.data
    corpora = open_corpora(data.train_shards, data)
    # What takes seconds to import stays behind the checks that do not need it.
    with importing():
        from bridgetower.engine import launch as launching
        from bridgetower.engine.optim import chosen_implementation
        from bridgetower.engine.preemption import StopRequests

    place = launching.read_launch()
    stop = StopRequests()  # from here on a request to stop is kept until a step is done
    start_logging(place.rank)
    with importing():  # DeepSpeed reads what read_launch has completed
        from bridgetower.data.held_out import check_held_out
        from bridgetower.engine.run import Job, Work, execute
        from bridgetower.run.prepare import build_tokenizer, data_cure, find_memory_config, precision_of
        from pretrain import assemble, assemble_data

    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, place.world_size, data.negative_group_size)
    config = assemble_data.complete(config)
    memory = find_memory_config(config.engine, DS_CONFIGS, place.device)
    tokenizer = build_tokenizer(config.model)
    # One rank looks at all pictures; if it finds some in both, the launcher ends the others.
    check_held_out(data, corpora if place.rank == 0 else None)
    identity = Identity(
        data_digests={str(path): m.digest() for path, m in zip(corpora.folders, corpora.manifests, strict=True)},
        optimizer=chosen_implementation(config.optim, place.device),
        precision=precision_of(memory),
        contrast_pairs=cut.micro_batch_size * cut.world_size if config.objectives.itc else 0,
    )
    folder = Path(config.run_root) / config.name
    job = Job(
        config=config,
        identity=identity,
        place=place,
        started_from=check_resume(folder, config, identity),
        deepspeed=merge_deepspeed_config(
            memory,
            micro_batch_size=cut.micro_batch_size,
            accumulation_steps=cut.accumulation_steps,
            max_grad_norm=config.optim.max_grad_norm,
        ),
        accumulation_steps=cut.accumulation_steps,
        evaluate_every_steps=config.evaluation.every_steps,
        yardstick=assemble.find_yardstick(config, place.device) if place.device.type == "cuda" else None,
        data_cure=data_cure(data, place.local_world_size),
    )
    task = assemble.build_task(config, corpora.names)

    def open_work() -> Work:
        from bridgetower.data.loader import micro_batches, record_pairs
        from bridgetower.evaluation.pretraining import write_scores
        from bridgetower.evaluation.table import print_scores

        stream = assemble_data.build_stream(config, corpora, cut, place.rank, tokenizer)
        splits = assemble_data.build_splits(config, tokenizer)

        def batches(first: int, end: int) -> Iterator[PretrainBatch]:
            found = micro_batches(stream, first, end, pin_memory=place.device.type == "cuda")
            if data.record_pairs:
                step = first // cut.accumulation_steps + 1
                found = record_pairs(found, folder / "pairs" / f"from-step{step:07d}-rank{place.rank:05d}.jsonl")
            return found

        def evaluate(step: int) -> dict[str, float]:
            results = assemble.evaluate_splits(task, splits, config, place.device)
            write_scores(folder, step, results)
            if results and step == config.optim.total_steps and place.rank == 0:
                print_scores(step, results)
            return {f"eval/{split}/{name}": value for split, r in results.items() for name, value in r.scores.items()}

        return Work(stream.order.num_pairs, batches, evaluate)

    return execute(job, task, open_work, stop)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
