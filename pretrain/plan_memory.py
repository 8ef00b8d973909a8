"""GPU memory of a run's weights, gradients and optimizer states under each ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from bridgetower.config.deepspeed import is_bf16
from bridgetower.config.run import RunConfig
from bridgetower.cost.parameters import build_shapes
from bridgetower.cost.sizes import check_formula
from bridgetower.engine.optim import group_parameters
from bridgetower.errors import ConfigError

STAGES = (0, 1, 2, 3)
_MASTER_BYTES, _ADAM_BYTES = 4, 8  # per parameter: float32; mean and squared mean in float32
_ALIGNMENT = 2  # DeepSpeed 0.19.8 pads a group to a multiple of this times the ranks
# DeepSpeed's reduce_bucket_size where a file of ds_configs/ does not say.
_DEFAULT_BUCKET = 500_000_000
_VISION_BLOCKS, _VISION_NORM = "vision_tower.vit.transformer.resblocks.", "vision_tower.vit.ln_post."
_TEXT_LAYERS = "text_tower.encoder.encoder.layer."


class Parameters(NamedTuple):
    """Numbers of parameters of a run."""

    groups: tuple[int, ...]
    """Number of trained parameters of each group of the optimizer."""
    frozen: int

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.groups)


class Splitting(NamedTuple):
    """What a file of ds_configs/ says about memory."""

    stage: int
    """ZeRO stage."""
    bf16: bool
    sums_fp32: bool
    """True if the gradients of micro-steps are summed in float32."""
    overlaps: bool
    """True if gradients are reduced during the backward pass."""
    bucket: int
    """Elements that are reduced together."""

    @property
    def element(self) -> int:
        """Bytes of an element of weights and states."""
        return 2 if self.bf16 else 4


class States(NamedTuple):
    """Bytes per GPU under one ZeRO stage."""

    stage: int
    weights: int
    master_weights: int
    optimizer: int
    gradients: int
    buckets: int

    @property
    def total(self) -> int:
        """Bytes per GPU of everything."""
        return sum(self[1:])


def read_splitting(memory: Mapping[str, Any]) -> Splitting:
    """Read the content of a file of ds_configs/."""
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
    """Count the parameters of a run by group of the optimizer, on torch's meta device.

    Args:
        config: its model is complete.

    Raises:
        ConfigError: there is no formula for the vision tower, or a tower has fewer layers than are frozen.
    """
    check_formula(config.model.vision)
    for tower, layers, frozen in (
        ("vision", config.model.vision.num_layers, config.optim.frozen_vision_layers),
        ("text", config.model.text.num_layers, config.optim.frozen_text_layers),
    ):
        if not -1 <= frozen <= layers:
            raise ConfigError(
                f"optim.frozen_{tower}_layers={frozen}, but the {tower} tower has {layers} layers. Use 0 (none) to "
                f"{layers}, or -1 for the whole tower."
            )
    task = nn.Module()  # names of parameters begin as those of PretrainTask
    task.model = build_shapes(config.model, config.objectives.heads)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(not _is_frozen(name, config))
    groups = tuple(sum(p.numel() for p in group["params"]) for group in group_parameters(task, config.optim))
    return Parameters(groups, sum(p.numel() for p in task.parameters()) - sum(groups))


def _is_frozen(name: str, config: RunConfig) -> bool:
    """Return whether training leaves a parameter as it is.

    The rules are those of ``bridgetower.model.freeze`` and ``bridgetower.tasks.pretraining``.
    """
    objectives, fusion = config.objectives, config.model.fusion
    if not objectives.itm:  # what only ITM reads
        unread = ["text_pooler.", "image_pooler."]
        if fusion.num_layers:
            unread.append(f"cross_modal.image_layers.{fusion.num_layers - 1}.")
        elif not objectives.itc:
            unread.append("vision_tower.")
        if name.startswith(tuple(unread)):
            return True
    if name.startswith("vision_tower."):
        is_norm = name.startswith(_VISION_NORM)
        return _is_below(name, _VISION_BLOCKS, config.optim.frozen_vision_layers, is_kept=is_norm)
    if name.startswith("text_tower."):
        return _is_below(name, _TEXT_LAYERS, config.optim.frozen_text_layers, is_kept=False)
    return False


def _is_below(name: str, layers: str, num_frozen: int, *, is_kept: bool) -> bool:
    """Return whether a parameter of a tower is frozen with its lowest layers.

    Args:
        layers: what the names of its layers' parameters begin with.
        num_frozen: -1 is the whole tower.
        is_kept: the parameter is trained unless the whole tower is frozen.
    """
    if num_frozen <= 0:
        return num_frozen < 0
    if name.startswith(layers):
        return int(name.removeprefix(layers).split(".")[0]) < num_frozen
    return not is_kept


def count_states(stage: int, parameters: Parameters, splitting: Splitting, num_gpus: int) -> States:
    """Count the bytes of one GPU, as DeepSpeed 0.19.8 lays them out (stages 1, 2) or as a stage is defined (0, 3)."""
    whole = _ALIGNMENT * num_gpus
    padded = sum(-(-group // whole) * whole for group in parameters.groups) if stage else parameters.trained
    partition = padded // num_gpus
    element, sum_bytes = splitting.element, 4 if splitting.sums_fp32 else splitting.element
    owned = partition if stage else padded
    weights = element * ((partition if stage == 3 else padded) + parameters.frozen)
    # One is filled while another is reduced, from a copy.
    buckets = splitting.bucket * (3 if splitting.overlaps else 2)
    if stage == 3:
        weights += element * min(splitting.bucket, padded)  # layers that are gathered ahead
    # Stage 1 sums whole gradients in float32 and reduces them from there; 2 reduces in the type of the states.
    gradients = sum_bytes * (partition if stage >= 2 else padded)
    if stage == 1 and splitting.bf16:
        gradients += sum_bytes * partition  # beside the whole sums, those of its own partition
    in_buckets = sum_bytes if stage == 1 else element
    return States(
        stage=stage,
        weights=weights,
        # Stages 1 and 2 keep a copy of their partition even if the weights are float32.
        master_weights=_MASTER_BYTES * owned if stage or splitting.bf16 else 0,
        optimizer=_ADAM_BYTES * owned,
        gradients=gradients,
        buckets=in_buckets * buckets if stage else 0,
    )


def why_not_offered(stage: int, splitting: Splitting) -> str:
    """Return why pretrain/train.py does not train with a stage; empty if it does."""
    if stage == 3:
        return "not offered: its files cannot be resumed at another number of GPUs"
    if stage == 0 and splitting.bf16:
        return "not offered in bf16: DeepSpeed keeps no float32 master weights"
    return ""
