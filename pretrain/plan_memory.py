"""What a run's states take of a GPU's memory under each ZeRO stage, from the numbers of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridgetower.config.deepspeed import is_bf16
from bridgetower.config.run import RunConfig
from bridgetower.engine.optim import group_parameters
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.init import shapes_alone
from bridgetower.tasks.pretraining import PretrainTask

STAGES = (0, 1, 2, 3)
_MASTER, _ADAM = 4, 8  # bytes a parameter: float32; mean and squared mean in float32
_ALIGNMENT = 2  # DeepSpeed 0.19.8 fills a group up to a multiple of this times the ranks
# Of zero_optimization where a file does not say.
_DEFAULT_BUCKET = 500_000_000


class Parameters(NamedTuple):
    """Numbers of parameters."""

    groups: tuple[int, ...]
    """Of each group of the optimizer."""
    frozen: int

    @property
    def trained(self) -> int:
        """Of all groups."""
        return sum(self.groups)


class Splitting(NamedTuple):
    """What a file of ds_configs/ says."""

    stage: int
    bf16: bool
    sums_fp32: bool
    """Gradients of micro-steps are added up in float32."""
    overlaps: bool
    bucket: int
    """Elements that are reduced together."""

    @property
    def element(self) -> int:
        """Bytes of an element of weights and states."""
        return 2 if self.bf16 else 4


class States(NamedTuple):
    """Bytes a GPU under one ZeRO stage."""

    stage: int
    weights: int
    master_weights: int
    optimizer: int
    gradients: int
    buckets: int

    @property
    def total(self) -> int:
        """Of all of it."""
        return sum(self[1:])


def read_splitting(memory: Mapping[str, Any]) -> Splitting:
    """From the content of a file of ds_configs/."""
    zero = memory["zero_optimization"]
    bf16 = is_bf16(memory)
    return Splitting(
        stage=zero["stage"],
        bf16=bf16,
        sums_fp32=not bf16 or memory.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        overlaps=bool(zero.get("overlap_comm", False)),
        bucket=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)),
    )


def count_parameters(config: RunConfig) -> Parameters:
    """Count those of a run, on torch's meta device."""
    with shapes_alone():
        model = BridgeTower(config.model, config.objectives.heads)
    freeze_layers(model, vision=config.optim.frozen_vision_layers, text=config.optim.frozen_text_layers)
    task = PretrainTask(model, config.objectives, config.compute)
    groups = tuple(sum(p.numel() for p in group["params"]) for group in group_parameters(task, config.optim))
    return Parameters(groups, sum(p.numel() for p in task.parameters()) - sum(groups))


def count_states(stage: int, parameters: Parameters, splitting: Splitting, num_gpus: int) -> States:
    """Of one GPU, as DeepSpeed 0.19.8 lays them out (stages 1 and 2), or as the stage is defined (0 and 3)."""
    whole = _ALIGNMENT * num_gpus
    padded = sum(-(-group // whole) * whole for group in parameters.groups) if stage else parameters.trained
    part = padded // num_gpus
    element, sums = splitting.element, 4 if splitting.sums_fp32 else splitting.element
    owned = part if stage else padded
    weights = element * ((part if stage == 3 else padded) + parameters.frozen)
    # One is filled while another is reduced, from a copy.
    buckets = splitting.bucket * (3 if splitting.overlaps else 2)
    if stage == 3:
        weights += element * min(splitting.bucket, padded)  # layers that are gathered ahead
    # Stage 1 sums whole gradients in float32 and reduces them from there; 2 reduces in the type of the states.
    gradients = sums * (part if stage >= 2 else padded)
    if stage == 1 and splitting.bf16:
        gradients += sums * part  # beside the whole sums, those of its own part
    in_buckets = sums if stage == 1 else element
    return States(
        stage=stage,
        weights=weights,
        # Stages 1 and 2 keep a copy of their part even if the weights are float32.
        master_weights=_MASTER * owned if stage or splitting.bf16 else 0,
        optimizer=_ADAM * owned,
        gradients=gradients,
        buckets=in_buckets * buckets if stage else 0,
    )


def why_not_offered(stage: int, splitting: Splitting) -> str:
    """Why pretrain/train.py does not train with a stage; empty if it does."""
    if stage == 3:
        return "not offered: its files cannot be resumed at another number of GPUs"
    if stage == 0 and splitting.bf16:
        return "not offered in bf16: DeepSpeed keeps no float32 master weights"
    return ""
