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
from bridgetower.engine.loop import TrainingPlan, train
from bridgetower.engine.metrics_file import read_metrics
from bridgetower.engine.preemption import StopRequests, stay_until_killed
from bridgetower.engine.score_file import forget_best_after
from bridgetower.engine.throughput import ReferenceSpeed
from bridgetower.engine.tracker import Tracker
from bridgetower.errors import BridgeTowerError
from bridgetower.io.files import claim_folder, write_atomically

logger = logging.getLogger("bridgetower.train")


class Work(NamedTuple):
    """What this rank trains on, and how the run is scored."""

    num_pairs: int
    """Pairs per epoch."""
    batches: Callable[[int, int], Iterator[NamedTuple]]
    """Opens the micro-batches from one micro-step of the run up to another."""
    evaluate: Callable[[int], dict[str, float]]
    """Computes scores on held-out data after a step; called on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run whose settings and data have been checked. Nothing of it has started yet."""

    config: Settings
    """Complete settings: nothing in them is left to be chosen."""
    identity: Identity
    launch: launching.Launch
    started_from: str
    """The checkpoint of another run, or empty."""
    deepspeed: dict[str, Any]
    """The configuration for ``deepspeed.initialize``."""
    accumulation_steps: int
    evaluate_every_steps: int
    """Steps between two evaluations; 0: only at the end."""
    reference_speed: ReferenceSpeed | None = None
    """What the measured speed is compared with; None: nothing."""
    data_suggestion: str = ""
    """What to do if steps wait for data, a sentence for the log."""
    kernels: str = ""
    """What computes the layers, for run.json and the first log line."""

    @property
    def folder(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.config.run_root) / self.config.name


def execute(job: Job, task: nn.Module, open_work: Callable[[], Work], stop: StopRequests) -> bool:
    """Train to the end, or until asked to stop; a checkpoint is saved in both cases.

    Args:
        task: takes a batch and returns (loss, metrics).
        open_work: called once, when there is a process group.

    Returns: True if it reached the end.
    """
    config, launch = job.config, job.launch
    lock = claim_folder(job.folder) if launch.rank == 0 else None
    launching.start(launch, config.engine.threads_per_rank)
    try:
        if launch.rank == 0:
            write_run_file(
                job.folder,
                config,
                job.identity,
                world_size=launch.world_size,
                device=str(launch.device),
                started_from=job.started_from,
                kernels=job.kernels,
            )
            write_atomically(job.folder / "deepspeed.json", json.dumps(job.deepspeed, indent=1).encode() + b"\n")
        logger.info("%s", _describe(job, task))
        return _train(job, task, open_work(), stop)
    except BridgeTowerError as error:
        error.rank = launch.rank
        raise
    finally:
        launching.finish()
        if lock is not None:
            os.close(lock)


def _describe(job: Job, task: nn.Module) -> str:
    """Say in a line what computes what: model, ranks, precision and kernels."""
    millions = sum(parameter.numel() for parameter in task.parameters()) / 1e6
    ranks = f"{job.launch.world_size} rank{'s' if job.launch.world_size > 1 else ''} on {job.launch.device.type}"
    memory = f"zero{job.deepspeed['zero_optimization']['stage']}_{job.identity.precision}"
    kernels = f", kernels: {job.kernels}" if job.kernels else ""
    return f"{job.config.name}: {millions:.1f} M parameters, {ranks}, {memory}{kernels}"


def _train(job: Job, task: nn.Module, work: Work, stop: StopRequests) -> bool:
    """Build the engine, resume, and run the loop to its end or to a stop."""
    config, folder, launch = job.config, job.folder, job.launch
    stop.keep_interrupts()
    engine = build_engine(task, config.optim, job.deepspeed, launch.device)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
    state = _resume(engine, checkpoints, config.resume)
    forget_best_after(folder, state.step)
    plan = _plan(job, work.num_pairs)
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
        is_complete = train(
            engine,
            work.batches(state.step * plan.accumulation_steps, plan.total_steps * plan.accumulation_steps),
            plan,
            state,
            rank=launch.rank,
            world_size=launch.world_size,
            tracker=tracker,
            checkpoints=checkpoints,
            stop=stop,
            evaluate=work.evaluate,
        )
    finally:
        tracker.close()
    if not is_complete:
        logger.info("stopped as requested at step %d, saved; the same command resumes from there", state.step)
        if stop.was_terminated and "SLURM_JOB_ID" in os.environ:
            stay_until_killed()
    return is_complete


def _resume(engine: Any, checkpoints: Checkpoints, resume: str) -> TrainState:
    """Load the newest intact checkpoint of the run; without one, the checkpoint that ``resume`` points to.

    Args:
        resume: auto, never, or the folder of a run or a checkpoint. Whether a run with checkpoints of its own agrees
            with it was checked before.

    Returns: how far training has come; step 0 if there is nothing to resume from.
    """
    checkpoint = checkpoints.find_newest_intact()
    if checkpoint is None and resume not in ("auto", "never"):
        checkpoint = find_checkpoint(Path(resume))
    if checkpoint is None:
        return TrainState()
    state = checkpoints.load(engine, checkpoint)
    logger.info("resuming from %s: step %d, %s pairs seen", checkpoint, state.step, f"{state.pairs_seen:,}")
    return state


def _plan(job: Job, num_pairs: int) -> TrainingPlan:
    config = job.config
    return TrainingPlan(
        total_steps=config.optim.total_steps,
        accumulation_steps=job.accumulation_steps,
        global_batch_size=config.data.global_batch_size,
        log_every_steps=config.tracker.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        evaluate_every_steps=job.evaluate_every_steps,
        seed=config.seed,
        num_pairs=num_pairs,
        reference_speed=job.reference_speed,
        data_suggestion=job.data_suggestion,
    )


def _has_scores(folder: Path, step: int) -> bool:
    """Return True on every rank if the metrics contain an evaluation of a step."""
    lines = read_metrics(folder) if dist.rank() == 0 else []
    names = [name for line in lines if line["step"] == step for name in line]
    has_scores: bool = dist.from_first_rank(any(name.startswith("eval/") for name in names))
    return has_scores
