"""From a configuration to the model and engine of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bridgetower import rng
from bridgetower.config.run import RunConfig
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.step_work import step_work
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.engine.checkpoint import load_weights
from bridgetower.engine.throughput import Yardstick
from bridgetower.errors import CheckpointError
from bridgetower.evaluation.pretraining import SplitScores, evaluate_split
from bridgetower.kernels.compiled import compile_parts
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.pretrained import check_vision_weights, load_tower_weights
from bridgetower.tasks.pretraining import PretrainTask


def find_yardstick(config: RunConfig, device: torch.device) -> Yardstick:
    """What speed is compared with: operations of a pair, and of the device in a second, by its name.

    To be called before there is a process group.
    """
    work = step_work(config.model, config.objectives)
    return Yardstick(flops_of_pair=work.of_pair, peak_flops=peak_flops(device.type))


def build_task(config: RunConfig, corpora: Sequence[str] = ()) -> PretrainTask:
    """Model and objectives with their initial weights, a function of the seed and the towers' weights.

    Args:
        corpora: names of those that it is trained on.
    """
    check_vision_weights(config.model.vision)
    torch.manual_seed(rng.key(config.seed, "weights") >> 1)
    model = BridgeTower(config.model, config.objectives.heads)
    load_tower_weights(model)
    freeze_layers(model, vision=config.optim.frozen_vision_layers, text=config.optim.frozen_text_layers)
    task = PretrainTask(model, config.objectives, config.compute, corpora)
    if config.compute.compile:
        compile_parts(model)
    return task


def load_task(config: RunConfig, checkpoint: Path, precision: str) -> PretrainTask:
    """The task of a run with the weights of a checkpoint, every one of them.

    Args:
        precision: of the weights, as run.json has it: bf16 or fp32.

    Raises:
        CheckpointError: the weights are not those of this model.
    """
    task = PretrainTask(BridgeTower(config.model, config.objectives.heads), config.objectives, config.compute)
    if precision == "bf16":
        task.bfloat16()
    try:
        task.load_state_dict(load_weights(checkpoint), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not hold this model: {error}") from error
    return task


def evaluate_splits(
    task: PretrainTask, splits: Sequence[HeldOutSplit], config: RunConfig, device: torch.device
) -> dict[str, SplitScores]:
    """Scores of all splits, by name; called on all ranks."""
    task.eval()
    return {
        split.name: evaluate_split(task, split, config.evaluation, seed=config.seed, device=device) for split in splits
    }
