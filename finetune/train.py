"""Fine-tune a BridgeTower: ``python finetune/train.py PRESET --init=PATH --section.field=value``.

The same under plain python, deepspeed, torchrun and srun.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, importing, run_command, start_logging
from bridgetower.config.deepspeed import merge_deepspeed_config
from bridgetower.config.finetune import NO_INIT, FinetuneConfig
from bridgetower.config.snapshot import Identity, check_resume
from bridgetower.data.corpora import open_corpora
from bridgetower.data.order import cut_global_batch
from bridgetower.data.targets import check_labels, count_classes
from bridgetower.errors import EXIT_PREEMPTED, ConfigError
from bridgetower.io.storage import to_path
from finetune.presets import DS_CONFIGS, PRESETS

if TYPE_CHECKING:
    from bridgetower.batch import FinetuneBatch

USAGE = "Usage: python finetune/train.py PRESET|RUN.json --init=PATH [--section.field=value ...]"


def main(preset: str = "", *unexpected: str, local_rank: str = "0", **overrides: str) -> None:
    """Fine-tune ``preset`` with dotted overrides. The deepspeed launcher adds ``local_rank``."""
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    if "epochs" in overrides and config.optim.total_steps:
        raise ConfigError(
            f"epochs={config.epochs:g} would have no effect: optim.total_steps={config.optim.total_steps} says how "
            "long to train. Leave one of them out, or add --optim.total_steps=0: a run.json, too, says how many."
        )
    if not run(config):
        sys.exit(EXIT_PREEMPTED)


def run(config: FinetuneConfig) -> bool:
    """Train to the end, or until asked to stop; then a checkpoint is saved.

    Everything that can be wrong with settings, data and weights is found before a process group or a GPU is touched.

    Returns: True if it came to the end.
    """
    if not config.init:
        raise ConfigError(
            "init is empty: which pretrained model? Give --init=runs/NAME, a checkpoint folder, a safetensors export, "
            f"a Hugging Face folder or hub name, or a .ckpt of the published code; --init={NO_INIT} starts from "
            "model.vision.weights and model.text.weights."
        )
    data, folder = config.data, Path(config.run_root) / config.name
    corpora = open_corpora(data.train_shards, data)
    classes = count_classes(config.task, config.model.heads.num_answers)
    for each in (corpora, *(open_corpora([shards], data) for shards in data.eval_shards)):
        check_labels(each, config.task, classes)
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
        from finetune import assemble, evaluation

    evaluation.check_selection(config, [to_path(shards).name for shards in data.eval_shards])
    is_retrieval = config.task == "retrieval"
    cut = cut_global_batch(
        data.global_batch_size, data.micro_batch_size, place.world_size, data.negative_group_size or None
    )
    memory = find_memory_config(config.engine, DS_CONFIGS, place.device)
    # One rank looks at all pictures; if it finds some in both, the launcher ends the others.
    looks = place.rank == 0 and not config.evaluation.on_trained_pictures
    check_held_out(
        data,
        corpora if looks else None,
        least_images=2 if is_retrieval else 1,
        suggestion="Take them out of one, or accept that with --evaluation.on_trained_pictures=true.",
    )
    order = assemble.build_order(config, corpora)
    start = assemble.find_start(config, folder)
    config = assemble.complete_steps(dataclasses.replace(config, model=start.config), order.num_pairs)
    tokenizer = build_tokenizer(config.model)
    identity = Identity(
        data_digests={str(path): m.digest() for path, m in zip(corpora.folders, corpora.manifests, strict=True)},
        optimizer=chosen_implementation(config.optim, place.device),
        precision=precision_of(memory),
        contrast_pairs=cut.micro_batch_size * cut.world_size if is_retrieval else 0,
    )
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
        evaluate_every_steps=assemble.evaluation_steps(config, order.num_pairs),
        data_cure=data_cure(data, place.local_world_size),
    )
    task = assemble.build_task(config, start)
    del start  # the weights are in the task

    def open_work() -> Work:
        from bridgetower.data.loader import micro_batches
        from bridgetower.evaluation.table import print_scores

        stream = assemble.build_stream(config, corpora, order, cut, place.rank, tokenizer)
        splits = assemble.build_splits(config, tokenizer)

        def batches(first: int, end: int) -> Iterator[FinetuneBatch]:
            return micro_batches(stream, first, end, pin_memory=place.device.type == "cuda")

        def evaluate(step: int) -> dict[str, float]:
            results = evaluation.evaluate_splits(task, splits, config, place.device)
            evaluation.write_results(job.folder, step, results, task, config)
            if results and step == config.optim.total_steps and place.rank == 0:
                print_scores(step, results)
            return {f"eval/{split}/{name}": value for split, r in results.items() for name, value in r.scores.items()}

        return Work(order.num_pairs, batches, evaluate)

    return execute(job, task, open_work, stop)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
