"""From a checked configuration to the job and the work that the engine runs, for both kinds of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bridgetower import dist
from bridgetower.config.deepspeed import merge_deepspeed_config
from bridgetower.config.snapshot import Identity, Settings, check_resume
from bridgetower.data.corpora import Corpora
from bridgetower.data.order import Cut
from bridgetower.engine.launch import Launch
from bridgetower.engine.optim import choose_implementation
from bridgetower.engine.run import Job, Work
from bridgetower.engine.throughput import ReferenceSpeed
from bridgetower.evaluation.scorer import SplitScores
from bridgetower.evaluation.table import print_scores
from bridgetower.run.prepare import precision_of, suggest_faster_data


def build_job(
    config: Settings,
    corpora: Corpora,
    cut: Cut,
    launch: Launch,
    memory: Mapping[str, object],
    *,
    kernels: str,
    has_contrast: bool,
    evaluate_every_steps: int,
    reference_speed: ReferenceSpeed | None = None,
) -> Job:
    """Describe a run for the engine, and check that its folder may be used with these settings.

    Args:
        config: complete.
        memory: content of the DeepSpeed file.
        kernels: name of what computes the layers.
        has_contrast: True if ITC compares the pairs of a micro-step, which makes their number decide the losses.
        evaluate_every_steps: 0 evaluates only at the end.
        reference_speed: what speed is reported against.

    Raises:
        ConfigError: the folder has checkpoints, and ``resume`` means others.
        CheckpointError: ``resume`` points to nothing, or to a run with other settings or data.
    """
    identity = Identity(
        data_digests={
            str(folder): manifest.digest() for folder, manifest in zip(corpora.folders, corpora.manifests, strict=True)
        },
        optimizer=choose_implementation(config.optim, launch.device),
        precision=precision_of(memory),
        contrast_pairs=cut.micro_batch_size * cut.world_size if has_contrast else 0,
    )
    return Job(
        config=config,
        identity=identity,
        launch=launch,
        started_from=check_resume(Path(config.run_root) / config.name, config, identity),
        deepspeed=merge_deepspeed_config(
            memory,
            micro_batch_size=cut.micro_batch_size,
            accumulation_steps=cut.accumulation_steps,
            max_grad_norm=config.optim.max_grad_norm,
        ),
        accumulation_steps=cut.accumulation_steps,
        evaluate_every_steps=evaluate_every_steps,
        kernels=kernels,
        reference_speed=reference_speed,
        data_suggestion=suggest_faster_data(config.data, launch.local_world_size),
    )


def build_work(
    config: Settings,
    num_pairs: int,
    batches: Callable[[int, int], Iterator[NamedTuple]],
    score: Callable[[int], Mapping[str, SplitScores]],
) -> Work:
    """Describe what this rank trains on and how it is scored; the scores of the last step are also printed.

    Args:
        num_pairs: pairs per epoch.
        batches: returns the micro-batches from one micro-step of the run up to another.
        score: scores all held-out splits after a step and writes the scores to the run folder; called on all ranks.
    """

    def evaluate(step: int) -> dict[str, float]:
        results = score(step)
        if results and step == config.optim.total_steps and dist.rank() == 0:
            print_scores(step, results)
        return {
            f"eval/{split}/{name}": value for split, result in results.items() for name, value in result.scores.items()
        }

    return Work(num_pairs, batches, evaluate)
