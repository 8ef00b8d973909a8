"""Pretrain a BridgeTower: ``python pretrain/train.py PRESET --section.field=value``.

The same under plain python, deepspeed, torchrun and srun.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, run_command, start_logging
from bridgetower.config.deepspeed import merge_deepspeed_config
from bridgetower.config.overrides import to_dict
from bridgetower.config.schema import RunConfig
from bridgetower.config.snapshot import RUN_FILE, Identity, check_same_run, read_run_file, write_run_file
from bridgetower.data.corpora import open_corpora
from bridgetower.data.order import cut_global_batch
from bridgetower.errors import EXIT_PREEMPTED, BridgeTowerError, CheckpointError, ConfigError
from bridgetower.files import claim_folder, write_atomically
from pretrain.presets import PRESETS

USAGE = "Usage: python pretrain/train.py PRESET|RUN.json [--section.field=value ...]"

logger = logging.getLogger("bridgetower.train")


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
    from bridgetower.engine import launch as launching
    from bridgetower.engine.optim import chosen_implementation
    from bridgetower.engine.preemption import StopRequests

    place = launching.read_launch()
    stop = StopRequests()  # from here on a request to stop is kept until a step is done
    start_logging(place.rank)
    # imports DeepSpeed, which reads what read_launch has completed
    from pretrain import assemble, assemble_data

    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, place.world_size, data.negative_group_size)
    config = assemble_data.complete(config)
    memory = assemble.find_memory_config(config, place.device)
    tokenizer = assemble_data.build_tokenizer(config)
    # One rank looks at all pictures; if it finds some in both, the launcher ends the others.
    assemble_data.check_held_out(data, corpora if place.rank == 0 else None)
    identity = Identity(
        data_digests={str(path): m.digest() for path, m in zip(corpora.folders, corpora.manifests, strict=True)},
        optimizer=chosen_implementation(config.optim, place.device),
        precision=assemble.precision_of(memory),
        contrast_pairs=cut.micro_batch_size * cut.world_size if config.objectives.itc else 0,
    )
    folder = Path(config.run_root) / config.name
    started_from = _check_resume(config, folder, identity)
    deepspeed_config = merge_deepspeed_config(
        memory,
        micro_batch_size=cut.micro_batch_size,
        accumulation_steps=cut.accumulation_steps,
        max_grad_norm=config.optim.max_grad_norm,
    )
    task = assemble.build_task(config, corpora.names)
    yardstick = assemble.find_yardstick(config, place.device) if place.device.type == "cuda" else None
    lock = claim_folder(folder) if place.rank == 0 else None
    launching.start(place, config.engine.threads_per_rank)
    try:
        if place.rank == 0:
            write_run_file(
                folder,
                config,
                identity,
                world_size=place.world_size,
                device=str(place.device),
                started_from=started_from,
            )
            write_atomically(folder / "deepspeed.json", json.dumps(deepspeed_config, indent=1).encode() + b"\n")
        stream = assemble_data.build_stream(config, corpora, cut, place.rank, tokenizer)
        splits = assemble_data.build_splits(config, tokenizer)
        return _train(config, folder, deepspeed_config, place, task, stream, splits, stop, yardstick)
    except BridgeTowerError as error:
        error.rank = place.rank
        raise
    finally:
        launching.finish()
        if lock is not None:
            os.close(lock)


def _train(
    config: RunConfig,
    folder: Path,
    deepspeed_config: dict[str, Any],
    place: Any,
    task: Any,
    stream: Any,
    splits: list[Any],
    stop: Any,
    yardstick: Any,
) -> bool:
    from bridgetower.data.loader import micro_batches, recorded
    from bridgetower.engine.checkpoint import Checkpoints, TrainState, find_checkpoint
    from bridgetower.engine.evaluate import write_scores
    from bridgetower.engine.initialize import build_engine
    from bridgetower.engine.loop import Plan, train
    from bridgetower.engine.preemption import stay_until_killed
    from bridgetower.engine.tracker import Tracker
    from pretrain import assemble, assemble_data
    from pretrain.score_table import print_scores

    stop.keep_interrupts()
    engine = build_engine(task, config.optim, deepspeed_config, place.device)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
    state = TrainState()
    newest = checkpoints.newest_good()
    if newest is None and config.resume not in ("auto", "never"):
        newest = find_checkpoint(Path(config.resume))
    if newest is not None:
        state = checkpoints.load(engine, newest)
        logger.info("resuming from %s: step %d, %s pairs seen", newest, state.step, f"{state.pairs_seen:,}")
    plan = Plan(
        total_steps=config.optim.total_steps,
        accumulation_steps=stream.cut.accumulation_steps,
        global_batch_size=config.data.global_batch_size,
        log_every_steps=config.tracker.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        evaluate_every_steps=config.evaluation.every_steps,
        seed=config.seed,
        num_pairs=stream.order.num_pairs,
        yardstick=yardstick,
        data_cure=assemble_data.data_cure(config.data, place.local_world_size),
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

    def evaluate(step: int) -> dict[str, float]:
        results = assemble.evaluate_splits(task, splits, config, place.device)
        write_scores(folder, step, results)
        if results and step == plan.total_steps and place.rank == 0:
            print_scores(step, results)
        return {f"eval/{split}/{name}": value for split, r in results.items() for name, value in r.scores.items()}

    batches = micro_batches(
        stream,
        state.step * plan.accumulation_steps,
        plan.total_steps * plan.accumulation_steps,
        pin_memory=place.device.type == "cuda",
    )
    if config.data.record_pairs:
        batches = recorded(batches, folder / "pairs" / f"from-step{state.step + 1:07d}-rank{place.rank:05d}.jsonl")
    try:
        if state.step >= plan.total_steps:
            # Nothing is left to train; the scores may be missing if the run was killed while they were made.
            logger.info("%s is complete: %d of %d steps", folder, state.step, plan.total_steps)
            tracker.write(state.step, evaluate(state.step))
            return True
        finished = train(
            engine,
            batches,
            plan,
            state,
            rank=place.rank,
            world_size=place.world_size,
            tracker=tracker,
            checkpoints=checkpoints,
            stop=stop,
            evaluate=evaluate,
        )
    finally:
        tracker.close()
    if not finished:
        logger.info("stopped as asked at step %d, saved; the same command goes on from there", state.step)
        if stop.was_terminated and "SLURM_JOB_ID" in os.environ:
            stay_until_killed()
    return finished


def _check_resume(config: RunConfig, folder: Path, identity: Identity) -> str:
    """Stop at a folder that must not be continued, or cannot be with these settings.

    Returns: the path that the run started from, or starts from now; empty for one from scratch.
    """
    has_own = any((folder / "checkpoints").glob("step*"))
    path = "" if config.resume in ("auto", "never") else str(Path(config.resume).resolve())
    if has_own:
        started_from = str(read_run_file(folder / RUN_FILE)["started_from"])
        if config.resume == "never":
            raise ConfigError(
                f"{folder} already holds a run with checkpoints, and resume=never. Give another --name, delete the "
                "folder, or use --resume=auto to go on with it."
            )
        # The command that started it may be repeated, as Slurm does; it then goes on from the run's own newest.
        if path and path != started_from:
            raise ConfigError(
                f"{folder} has checkpoints of its own and did not start from resume={config.resume}. Use "
                "--resume=auto to go on from its newest, or another --name for a run that starts from there."
            )
        check_same_run(folder, config, identity)
        return started_from
    if path:
        if not Path(path).is_dir():
            raise CheckpointError(
                f"resume={config.resume} is neither a run folder nor a checkpoint. Use auto, never, or a folder "
                f"such as {Path(config.run_root) / 'NAME'} or .../checkpoints/step0001000."
            )
        run_folder = Path(path).parent.parent if Path(path).parent.name == "checkpoints" else Path(path)
        check_same_run(run_folder, config, identity)
    return path


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
