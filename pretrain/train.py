"""Pretrain a BridgeTower: ``python pretrain/train.py PRESET --section.field=value``.

May be started by plain python, deepspeed, torchrun or srun.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, importing, run_command
from bridgetower.config.run import RunConfig
from bridgetower.data.corpora import open_corpora
from bridgetower.data.order import cut_global_batch
from bridgetower.errors import EXIT_PREEMPTED
from pretrain.presets import DS_CONFIGS, PRESETS

if TYPE_CHECKING:
    from bridgetower.batch import PretrainBatch
    from bridgetower.data.corpora import Corpora
    from bridgetower.data.order import Cut
    from bridgetower.data.text import Tokenizer
    from bridgetower.engine.launch import Launch
    from bridgetower.engine.run import Work
    from bridgetower.evaluation.scorer import SplitScores
    from bridgetower.tasks.pretraining import PretrainTask

USAGE = "Usage: python pretrain/train.py PRESET|RUN.json [--section.field=value ...]"


def main(preset: str = "", *unexpected: str, local_rank: str = "0", **overrides: str) -> None:
    """Pretrain ``preset`` with dotted overrides. The deepspeed launcher adds ``local_rank``."""
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    if not run(config):
        sys.exit(EXIT_PREEMPTED)


def run(config: RunConfig) -> bool:
    """Train to the end, or until a request to stop; a stopped run saves a checkpoint.

    Whatever can be wrong with settings and data is found before a process group or a GPU is touched.

    Returns: True if the run is complete.
    """
    data = config.data
    corpora = open_corpora(data.train_shards, data)
    # Imports that take seconds stay behind the checks that do not need them.
    with importing():
        from bridgetower.run.start import start_process

    launch, stop = start_process()
    with importing():  # after start_process, which completes the environment that DeepSpeed reads
        from bridgetower.data.held_out import check_held_out
        from bridgetower.engine.run import execute
        from bridgetower.kernels.choose import choose_ops
        from bridgetower.run.job import build_job
        from bridgetower.run.prepare import build_tokenizer, find_memory_config
        from pretrain import assemble, assemble_data

    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, launch.world_size, data.negative_group_size)
    config = assemble_data.complete(config)
    memory = find_memory_config(config.engine, DS_CONFIGS, launch.device)
    tokenizer = build_tokenizer(config.model)
    # Rank 0 alone compares the images; if it finds held-out ones among the training data, the launcher ends the others.
    check_held_out(data, corpora if launch.rank == 0 else None)
    ops = choose_ops(launch.device, fuse_kernels=config.compute.fuse_kernels, compiled=config.compute.compile)
    job = build_job(
        config,
        corpora,
        cut,
        launch,
        memory,
        kernels=ops.name,
        has_contrast=config.objectives.itc,
        evaluate_every_steps=config.evaluation.every_steps,
        reference_speed=assemble.find_reference_speed(config, launch.device) if launch.device.type == "cuda" else None,
    )
    task = assemble.build_task(config, ops, corpora.names)
    return execute(job, task, lambda: _open_work(config, job.folder, launch, task, corpora, cut, tokenizer), stop)


def _open_work(
    config: RunConfig,
    folder: Path,
    launch: Launch,
    task: PretrainTask,
    corpora: Corpora,
    cut: Cut,
    tokenizer: Tokenizer,
) -> Work:
    """Open the training stream of this rank and the held-out splits."""
    from bridgetower.data.loader import micro_batches, record_pairs
    from bridgetower.evaluation.score_file import write_scores
    from bridgetower.run.job import build_work
    from pretrain import assemble, assemble_data

    stream = assemble_data.build_stream(config, corpora, cut, launch.rank, tokenizer)
    splits = assemble_data.build_splits(config, tokenizer)

    def batches(first: int, end: int) -> Iterator[PretrainBatch]:
        prepared = micro_batches(stream, first, end, pin_memory=launch.device.type == "cuda")
        if not config.data.record_pairs:
            return prepared
        step = first // cut.accumulation_steps + 1
        return record_pairs(prepared, folder / "pairs" / f"from-step{step:07d}-rank{launch.rank:05d}.jsonl")

    def score(step: int) -> dict[str, SplitScores]:
        results = assemble.evaluate_splits(task, splits, config, launch.device)
        write_scores(folder, step, results)
        return results

    return build_work(config, stream.order.num_pairs, batches, score)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
