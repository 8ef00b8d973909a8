"""Score a run on held-out data: ``python pretrain/evaluate_run.py runs/demo``.

May be started by plain python, deepspeed, torchrun or srun; the scores are the same.
"""

from __future__ import annotations

import logging
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import narrow_overrides, run_command, show_usage_or_stop, start_logging
from bridgetower.config.data import DataConfig
from bridgetower.config.snapshot import RUN_FILE, read_run_config, read_run_file
from bridgetower.data.corpora import Corpora, open_corpora
from bridgetower.errors import BridgeTowerError, ConfigError, DataError

USAGE = """Usage: python pretrain/evaluate_run.py RUN [--section.field=value ...]

RUN is a run folder, whose newest good checkpoint is scored, or a checkpoint folder. The scores are printed and written
to eval.json and predictions.json of the run folder. Settings that are not given are the run's."""

_SETTINGS = ("data.eval_shards", "evaluation.")

logger = logging.getLogger("bridgetower.evaluate_run")


def main(run: str = "", *unexpected: str, local_rank: str = "0", **overrides: str) -> None:
    """Score a run on held-out data. The deepspeed launcher adds ``local_rank``."""
    if not run:
        show_usage_or_stop("run", overrides, USAGE)
    path = Path(run)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    config = narrow_overrides(read_run_config(folder / RUN_FILE), _SETTINGS, unexpected, overrides, USAGE)
    if not config.data.eval_shards:
        raise ConfigError(f"The run {config.name} has no data.eval_shards. Give --data.eval_shards=DIR.")
    precision = read_run_file(folder / RUN_FILE)["precision"]
    # Imports that take seconds stay behind the checks that do not need them.
    from bridgetower.engine import launch as launching

    launch = launching.read_launch()
    start_logging(launch.rank)
    # These import DeepSpeed, which reads environment variables that read_launch has completed.
    from bridgetower.data.held_out import check_held_out
    from bridgetower.engine.checkpoint import find_checkpoint
    from bridgetower.engine.checkpoint_files import read_description
    from bridgetower.evaluation.score_file import write_scores
    from bridgetower.evaluation.table import print_scores
    from bridgetower.kernels.choose import choose_ops
    from bridgetower.run.prepare import build_tokenizer
    from pretrain import assemble, assemble_data

    # Rank 0 alone compares the images; if it finds some that were trained on, the launcher ends the others.
    check_held_out(config.data, _open_training_data(config.data) if launch.rank == 0 else None)
    tokenizer = build_tokenizer(config.model)
    launching.start(launch, config.engine.threads_per_rank)
    try:
        checkpoint = find_checkpoint(path)
        ops = choose_ops(launch.device, fuse_kernels=config.compute.fuse_kernels, compiled=config.compute.compile)
        task = assemble.load_task(config, checkpoint, precision, ops).to(launch.device)
        results = assemble.evaluate_splits(task, assemble_data.build_splits(config, tokenizer), config, launch.device)
        step = read_description(checkpoint)["step"]
        write_scores(folder, step, results)
        if launch.rank == 0:
            print_scores(step, results)
    except BridgeTowerError as error:
        error.rank = launch.rank
        raise
    finally:
        launching.finish()


def _open_training_data(data: DataConfig) -> Corpora | None:
    """Open the corpora that the run was trained on; None with a warning where they are not on this machine."""
    try:
        return open_corpora(data.train_shards, data)
    except (ConfigError, DataError) as error:
        logger.warning("the held-out images are not compared with the training images: %s", error)
        return None


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
