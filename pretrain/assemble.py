"""The model of a pretraining run: built with its initial weights, loaded from a checkpoint, and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bridgetower import rng
from bridgetower.config.run import RunConfig
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.step_work import step_work
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.engine.checkpoint_files import load_weights
from bridgetower.engine.throughput import ReferenceSpeed
from bridgetower.errors import CheckpointError
from bridgetower.evaluation.pretraining import evaluate_split
from bridgetower.evaluation.scorer import SplitScores
from bridgetower.kernels.ops import Ops
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.pretrained import check_vision_weights, load_tower_weights
from bridgetower.tasks.pretraining import PretrainTask


def find_reference_speed(config: RunConfig, device: torch.device) -> ReferenceSpeed:
    """Return what speed is reported against: operations per pair, and the device's peak operations per second.

    To be called before there is a process group: a tower without a formula is run to count its operations.
    """
    work = step_work(config.model, config.objectives)
    return ReferenceSpeed(flops_per_pair=work.of_pair, peak_flops=peak_flops(device.type))


def build_task(config: RunConfig, ops: Ops | None = None, corpora: Sequence[str] = ()) -> PretrainTask:
    """Build model and objectives with initial weights that depend only on the seed and the towers' weights.

    Args:
        ops: what computes the layers; None: the fastest operations of this machine.
        corpora: names of the training corpora.
    """
    check_vision_weights(config.model.vision)
    torch.manual_seed(rng.key(config.seed, "weights") >> 1)
    task = _construct(config, ops, corpora)
    load_tower_weights(task.model)
    freeze_layers(task.model, vision=config.optim.frozen_vision_layers, text=config.optim.frozen_text_layers)
    return task


def load_task(config: RunConfig, checkpoint: Path, precision: str, ops: Ops | None = None) -> PretrainTask:
    """Build the task of a run with the weights of a checkpoint.

    Args:
        precision: precision of the weights, as run.json has it: bf16 or fp32.
        ops: what computes the layers; None: the fastest operations of this machine.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of this model, or has another one.
    """
    task = _construct(config, ops)
    if precision == "bf16":
        task.bfloat16()
    try:
        task.load_state_dict(load_weights(checkpoint), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} does not hold this model: {error}\nGive a checkpoint of the run whose run.json is used."
        ) from error
    return task


def _construct(config: RunConfig, ops: Ops | None, corpora: Sequence[str] = ()) -> PretrainTask:
    model = BridgeTower(config.model, config.objectives.heads, ops=ops, recompute=config.compute.recompute)
    return PretrainTask(model, config.objectives, config.compute, corpora)


def evaluate_splits(
    task: PretrainTask, splits: Sequence[HeldOutSplit], config: RunConfig, device: torch.device
) -> dict[str, SplitScores]:
    """Score all splits; called on all ranks.

    Returns: the scores by the name of the split.
    """
    task.eval()
    return {
        split.name: evaluate_split(task, split, config.evaluation, seed=config.seed, device=device) for split in splits
    }
