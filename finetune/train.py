"""Fine-tune a BridgeTower: ``python finetune/train.py PRESET --init=PATH --section.field=value``.

May be started by plain python, deepspeed, torchrun or srun.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, importing, run_command
from bridgetower.config.finetune import NO_INIT, FinetuneConfig
from bridgetower.data.corpora import open_corpora
from bridgetower.data.order import cut_global_batch
from bridgetower.data.targets import check_labels, count_classes
from bridgetower.errors import EXIT_PREEMPTED, ConfigError
from finetune.presets import DS_CONFIGS, PRESETS

if TYPE_CHECKING:
    from bridgetower.batch import FinetuneBatch
    from bridgetower.data.corpora import Corpora
    from bridgetower.data.order import Cut
    from bridgetower.data.text import Tokenizer
    from bridgetower.engine.launch import Launch
    from bridgetower.engine.run import Work
    from bridgetower.evaluation.scorer import SplitScores
    from finetune.tasks import FinetuneTask

USAGE = "Usage: python finetune/train.py PRESET|RUN.json --init=PATH [--section.field=value ...]"


def main(preset: str = "", *unexpected: str, local_rank: str = "0", **overrides: str) -> None:
    """Fine-tune ``preset`` with dotted overrides. The deepspeed launcher adds ``local_rank``."""
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    if "epochs" in overrides and config.optim.total_steps:
        raise ConfigError(
            f"epochs={config.epochs:g} would have no effect, because optim.total_steps={config.optim.total_steps} is "
            "set (in a run.json it always is). Leave one of them out, or add --optim.total_steps=0."
        )
    if not run(config):
        sys.exit(EXIT_PREEMPTED)


def run(config: FinetuneConfig) -> bool:
    """Train to the end, or until a request to stop; a stopped run saves a checkpoint.

    Whatever can be wrong with settings, data and weights is found before a process group or a GPU is touched.

    Returns: True if the run is complete.
    """
    data, is_retrieval = config.data, config.task == "retrieval"
    _check_init(config)
    corpora = open_corpora(data.train_shards, data)
    classes = count_classes(config.task, config.model.heads.num_answers)
    for labelled in (corpora, *(open_corpora([shards], data) for shards in data.eval_shards)):
        check_labels(labelled, config.task, classes)
    # Imports that take seconds stay behind the checks that do not need them.
    with importing():
        from bridgetower.run.start import start_process

    launch, stop = start_process()
    with importing():  # after start_process, which completes the environment that DeepSpeed reads
        from bridgetower.data.held_out import check_held_out
        from bridgetower.engine.run import execute
        from bridgetower.kernels.choose import choose_ops
        from bridgetower.run.job import build_job
        from bridgetower.run.prepare import build_order, build_tokenizer, find_memory_config
        from finetune import assemble, evaluation

    evaluation.check_selection(config)
    cut = cut_global_batch(
        data.global_batch_size, data.micro_batch_size, launch.world_size, data.negative_group_size or None
    )
    memory = find_memory_config(config.engine, DS_CONFIGS, launch.device)
    # Rank 0 alone compares the images; if it finds held-out ones among the training data, the launcher ends the others.
    compares_images = launch.rank == 0 and not config.evaluation.on_trained_pictures
    check_held_out(
        data,
        corpora if compares_images else None,
        least_images=2 if is_retrieval else 1,
        suggestion="Take them out of one, or accept that with --evaluation.on_trained_pictures=true.",
    )
    order = build_order(config, corpora)
    start = assemble.find_start(config, Path(config.run_root) / config.name)
    config = assemble.complete_steps(dataclasses.replace(config, model=start.config), order.num_pairs)
    tokenizer = build_tokenizer(config.model)
    ops = choose_ops(launch.device, compiled=config.compute.compile)
    job = build_job(
        config,
        corpora,
        cut,
        launch,
        memory,
        kernels=ops.name,
        has_contrast=is_retrieval,
        evaluate_every_steps=assemble.evaluation_steps(config, order.num_pairs),
    )
    task = assemble.build_task(config, start, ops)
    del start  # the weights are in the task
    return execute(job, task, lambda: _open_work(config, job.folder, launch, task, corpora, cut, tokenizer), stop)


def _check_init(config: FinetuneConfig) -> None:
    if not config.init:
        raise ConfigError(
            "init is empty, so the run has no pretrained model. Give --init=runs/NAME, a checkpoint folder, a "
            "safetensors export, a Hugging Face folder or hub name, or a .ckpt of the published code; "
            f"--init={NO_INIT} starts from model.vision.weights and model.text.weights."
        )


def _open_work(
    config: FinetuneConfig,
    folder: Path,
    launch: Launch,
    task: FinetuneTask,
    corpora: Corpora,
    cut: Cut,
    tokenizer: Tokenizer,
) -> Work:
    """Open the training stream of this rank and the held-out splits."""
    from bridgetower.data.loader import micro_batches
    from bridgetower.run.job import build_work
    from finetune import assemble, evaluation

    stream = assemble.build_stream(config, corpora, cut, launch.rank, tokenizer)
    splits = assemble.build_splits(config, tokenizer)

    def batches(first: int, end: int) -> Iterator[FinetuneBatch]:
        return micro_batches(stream, first, end, pin_memory=launch.device.type == "cuda")

    def score(step: int) -> dict[str, SplitScores]:
        results = evaluation.evaluate_splits(task, splits, config, launch.device)
        evaluation.write_results(folder, step, results, task, config)
        return results

    return build_work(config, stream.order.num_pairs, batches, score)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
