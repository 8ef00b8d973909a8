"""A run from a model and its data to the end: folder, engine, resume, loop and scores, the same for every task."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bridgetower import dist
from bridgetower.config.overrides import to_dict
from bridgetower.config.snapshot import Identity, Settings, write_run_file
from bridgetower.engine import launch as launching
from bridgetower.engine.checkpoint import Checkpoints, TrainState, find_checkpoint
from bridgetower.engine.initialize import build_engine
from bridgetower.engine.loop import Plan, train
from bridgetower.engine.preemption import StopRequests, stay_until_killed
from bridgetower.engine.score_file import forget_best_after
from bridgetower.engine.throughput import Yardstick
from bridgetower.engine.tracker import Tracker, read_metrics
from bridgetower.errors import BridgeTowerError
from bridgetower.io.files import claim_folder, write_atomically

logger = logging.getLogger("bridgetower.train")


class Work(NamedTuple):
    """What this rank trains on, and how it is scored."""

    num_pairs: int
    """Of an epoch."""
    batches: Callable[[int, int], Iterator[NamedTuple]]
    """Micro-batches from one micro-step of the run up to another."""
    evaluate: Callable[[int], dict[str, float]]
    """Scores on held-out data after a step; called on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that has been checked: nothing of it is started yet."""

    config: Settings
    """Complete."""
    identity: Identity
    place: launching.Launch
    started_from: str
    """The checkpoint of another run, or empty."""
    deepspeed: dict[str, Any]
    """What is given to DeepSpeed."""
    accumulation_steps: int
    evaluate_every_steps: int
    """0 only at the end."""
    yardstick: Yardstick | None = None
    """What speed is compared with."""
    data_cure: str = ""
    """What to do where steps wait for data, for people."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.config.run_root) / self.config.name


def execute(job: Job, task: nn.Module, open_work: Callable[[], Work], stop: StopRequests) -> bool:
    """Train to the end, or until asked to stop; then a checkpoint is saved.

    Args:
        task: takes a batch and returns (loss, metrics).
        open_work: called once there is a process group.

    Returns: True if it came to the end.
    """
    config, place = job.config, job.place
    lock = claim_folder(job.folder) if place.rank == 0 else None
    launching.start(place, config.engine.threads_per_rank)
    try:
        if place.rank == 0:
            write_run_file(
                job.folder,
                config,
                job.identity,
                world_size=place.world_size,
                device=str(place.device),
                started_from=job.started_from,
            )
            write_atomically(job.folder / "deepspeed.json", json.dumps(job.deepspeed, indent=1).encode() + b"\n")
        return _train(job, task, open_work(), stop)
    except BridgeTowerError as error:
        error.rank = place.rank
        raise
    finally:
        launching.finish()
        if lock is not None:
            os.close(lock)


def _train(job: Job, task: nn.Module, work: Work, stop: StopRequests) -> bool:
    config, folder, place = job.config, job.folder, job.place
    stop.keep_interrupts()
    engine = build_engine(task, config.optim, job.deepspeed, place.device)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
    state = TrainState()
    newest = checkpoints.find_newest_intact()
    if newest is None and config.resume not in ("auto", "never"):
        newest = find_checkpoint(Path(config.resume))
    if newest is not None:
        state = checkpoints.load(engine, newest)
        logger.info("resuming from %s: step %d, %s pairs seen", newest, state.step, f"{state.pairs_seen:,}")
    forget_best_after(folder, state.step)
    plan = Plan(
        total_steps=config.optim.total_steps,
        accumulation_steps=job.accumulation_steps,
        global_batch_size=config.data.global_batch_size,
        log_every_steps=config.tracker.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        evaluate_every_steps=job.evaluate_every_steps,
        seed=config.seed,
        num_pairs=work.num_pairs,
        yardstick=job.yardstick,
        data_cure=job.data_cure,
    )
    tracker = Tracker(
        folder,
        total_steps=plan.total_steps,
        first_step=state.step,
        wandb_mode=config.tracker.wandb,
        wandb_project=config.tracker.wandb_project,
        wandb_entity=config.tracker.wandb_entity,
        run_config=to_dict(config),
    )
    try:
        is_complete = state.step >= plan.total_steps
        if is_complete:
            logger.info("%s is complete: %d of %d steps", folder, state.step, plan.total_steps)
        # The run may have been stopped before an evaluation that was due, or killed during it.
        if is_complete or (state.step and plan.is_evaluated(state.step) and not _has_scores(folder, state.step)):
            tracker.write(state.step, work.evaluate(state.step))
        if is_complete:
            return True
        finished = train(
            engine,
            work.batches(state.step * plan.accumulation_steps, plan.total_steps * plan.accumulation_steps),
            plan,
            state,
            rank=place.rank,
            world_size=place.world_size,
            tracker=tracker,
            checkpoints=checkpoints,
            stop=stop,
            evaluate=work.evaluate,
        )
    finally:
        tracker.close()
    if not finished:
        logger.info("stopped as asked at step %d, saved; the same command goes on from there", state.step)
        if stop.was_terminated and "SLURM_JOB_ID" in os.environ:
            stay_until_killed()
    return finished


def _has_scores(folder: Path, step: int) -> bool:
    """Whether the metrics have an evaluation of a step, on every rank the same."""
    lines = read_metrics(folder) if dist.rank() == 0 else []
    names = [name for line in lines if line["step"] == step for name in line]
    has_scores: bool = dist.from_first_rank(any(name.startswith("eval/") for name in names))
    return has_scores
