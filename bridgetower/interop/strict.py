"""Strict loading of weights: every tensor fits by name, shape and dtype, or nothing is loaded and faults are listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from bridgetower.config.model import ModelConfig
from bridgetower.errors import CheckpointError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS
from bridgetower.model.init import WithoutInitialValues, shapes_alone
from bridgetower.model.pretrained import fit_positions
from bridgetower.model.sizes import complete_model_config

_POSITION_TABLES = ("vision_tower.vit.positional_embedding", "vision_tower.vit.pos_embed")
_MAX_NAMES_LISTED = 40


def load_strictly(
    config: ModelConfig,
    heads: Sequence[str],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    image_size_px: int | None = None,
) -> BridgeTower:
    """Build a model and copy weights into it.

    Args:
        config: configuration of the saved model.
        heads: names of the saved heads.
        weights: tensors by this program's names. The model gets their floating-point dtype, the widest one if there
            are several.
        source: where the weights are from, for error messages.
        image_size_px: side of the images to read, if not the configuration's; the position table is resized to it.

    Returns: the model, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, not expected, or has another shape.
        ConfigError: no model can be built from the configuration.
    """
    config = complete_model_config(config)
    check_tensors(build_shapes(config, heads, source), weights, source)
    resized = dataclasses.replace(config, image_size_px=image_size_px or config.image_size_px)
    with WithoutInitialValues():
        model = BridgeTower(resized, heads)
    # The widest dtype of the weights, so that no value is rounded.
    model = model.to(
        reduce(torch.promote_types, {value.dtype for value in weights.values() if value.is_floating_point()})
    )
    parameters = model.state_dict()
    fitting = {
        name: fit_positions(value, parameters[name], model.image_grid_side)
        if name in _POSITION_TABLES and value.shape != parameters[name].shape
        else value
        for name, value in weights.items()
    }
    # A second check, because a position table without a square grid cannot be resized.
    check_tensors(parameters, fitting, f"{source}, resized to images of {resized.image_size_px} px,")
    model.load_state_dict(fitting, strict=True)
    return model.eval()


def build_shapes(config: ModelConfig, heads: Sequence[str], source: str) -> dict[str, Tensor]:
    """Build a model's ``state_dict`` on the meta device: names, shapes and dtypes without memory.

    Raises:
        CheckpointError: a head does not exist.
    """
    unknown = [head for head in heads if head not in HEADS]
    if unknown:
        raise CheckpointError(
            f"{source} has the head(s) {', '.join(unknown)}, this program knows {', '.join(HEADS)}. Update the program."
        )
    with shapes_alone():
        return BridgeTower(config, heads).state_dict()


def check_tensors(
    needed: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    unused: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Check that tensors are those that a model needs, by name, shape and dtype.

    Args:
        needed: the model's tensors, by the file's names; only shapes and dtypes are read.
        tensors: the file's tensors.
        unused: shapes of tensors that the file may hold and that no model reads.

    Raises:
        CheckpointError: with the names of all tensors that are missing, not expected, or of another shape or dtype.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    allowed = {**{name: tuple(shape) for name, shape in (unused or {}).items()}, **shapes}
    missing = [f"{name} {shape}" for name, shape in shapes.items() if name not in tensors]
    unexpected = [f"{name} {tuple(value.shape)}" for name, value in tensors.items() if name not in allowed]
    misshapen = [
        f"{name} {tuple(value.shape)}, needed {allowed[name]}"
        for name, value in tensors.items()
        if name in allowed and tuple(value.shape) != allowed[name]
    ]
    mistyped = [
        f"{name} {value.dtype}"
        for name, value in tensors.items()
        # 8-bit values are those of a quantised model and mean nothing without their scales.
        if name in needed
        and needed[name].is_floating_point()
        and not (value.is_floating_point() and value.itemsize > 1)
    ]
    faults = [
        _list_fault("missing", missing),
        _list_fault("not expected", unexpected),
        _list_fault("of another shape", misshapen),
        _list_fault("not of a floating-point dtype of 16 bits or more", mistyped),
    ]
    if any(faults):
        listed = "\n".join(f"  {fault}" for fault in faults if fault)
        raise CheckpointError(
            f"{source} does not hold exactly this model's tensors:\n{listed}\nCopy or download it again; if it is "
            "another model's file, load it with that model's configuration."
        )


def _list_fault(fault: str, tensors: Sequence[str]) -> str:
    if not tensors:
        return ""
    more = f"; and {len(tensors) - _MAX_NAMES_LISTED} more" if len(tensors) > _MAX_NAMES_LISTED else ""
    return f"{len(tensors)} {fault}: {'; '.join(tensors[:_MAX_NAMES_LISTED])}{more}"
