"""Strict loading: every tensor has its place and its shape, or nothing is loaded and all faults are listed."""

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
_MOST_NAMES = 40


def load_strictly(
    config: ModelConfig,
    heads: Sequence[str],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    image_size_px: int | None = None,
) -> BridgeTower:
    """Build a model and fill it.

    Args:
        config: of the model that was saved.
        heads: those that were saved.
        weights: by our names. They are copied; the model takes their floating-point type.
        source: where they are from, for errors.
        image_size_px: another side of the images than config's; position tables are resized.

    Returns: the model, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, not expected, or of another shape.
        ConfigError: the configuration is not of a model that can be built.
    """
    config = complete_model_config(config)
    check_tensors(tensors_of(config, heads, source), weights, source)
    resized = dataclasses.replace(config, image_size_px=image_size_px or config.image_size_px)
    with WithoutInitialValues():
        model = BridgeTower(resized, heads)
    # The widest type among them, so that nothing is rounded.
    model = model.to(
        reduce(torch.promote_types, {value.dtype for value in weights.values() if value.is_floating_point()})
    )
    own = model.state_dict()
    fitting = {
        name: fit_positions(value, own[name], model.image_grid_side)
        if name in _POSITION_TABLES and value.shape != own[name].shape
        else value
        for name, value in weights.items()
    }
    check_tensors(own, fitting, f"{source}, resized to images of {resized.image_size_px} px,")
    model.load_state_dict(fitting, strict=True)
    return model.eval()


def tensors_of(config: ModelConfig, heads: Sequence[str], source: str) -> dict[str, Tensor]:
    """The tensors of a model by our names, without memory behind them.

    Raises:
        CheckpointError: a head that does not exist.
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
    found: Mapping[str, Tensor],
    source: str,
    *,
    unused: Mapping[str, Sequence[int]] | None = None,
    cure: str = "Copy or download it again; if it is of another model, load it with that model's configuration.",
) -> None:
    """Compare tensors with those that a model needs, by name, shape and kind of number.

    Args:
        needed: of the model.
        found: in the file, in the file's names.
        unused: shapes of tensors that may be there and that no model reads.

    Raises:
        CheckpointError: with the names of all that are missing, not expected or of another shape.
    """
    may_be = unused or {}
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    allowed = {**{name: tuple(shape) for name, shape in may_be.items()}, **shapes}
    missing = [f"{name} {shape}" for name, shape in shapes.items() if name not in found]
    unexpected = [f"{name} {tuple(value.shape)}" for name, value in found.items() if name not in allowed]
    misshapen = [
        f"{name} {tuple(value.shape)}, needed {allowed[name]}"
        for name, value in found.items()
        if name in allowed and tuple(value.shape) != allowed[name]
    ]
    mistyped = [
        f"{name} {value.dtype}"
        for name, value in found.items()
        # Narrower ones are numbers of a quantised model, which need their scales.
        if name in needed
        and needed[name].is_floating_point()
        and not (value.is_floating_point() and value.itemsize > 1)
    ]
    faults = [
        _list("missing", missing),
        _list("not expected", unexpected),
        _list("of another shape", misshapen),
        _list("of another type than floating-point numbers", mistyped),
    ]
    if any(faults):
        listed = "\n".join(f"  {fault}" for fault in faults if fault)
        raise CheckpointError(f"{source} does not hold this model, tensor for tensor:\n{listed}\n{cure}")


def _list(fault: str, tensors: Sequence[str]) -> str:
    if not tensors:
        return ""
    more = f"; and {len(tensors) - _MOST_NAMES} more" if len(tensors) > _MOST_NAMES else ""
    return f"{len(tensors)} {fault}: {'; '.join(tensors[:_MOST_NAMES])}{more}"
