"""Pretrained weights for the towers, by name, strictly: each tensor has its place, or nothing is loaded.

Shapes: N grid side of the position table, D width.
"""

from __future__ import annotations

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import RobertaModel

from bridgetower.config.schema import ModelConfig
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower

NO_WEIGHTS = "none"


def load_tower_weights(model: BridgeTower, config: ModelConfig) -> None:
    """Fill the towers with the weights that the configuration names; ``none`` leaves them random.

    Raises:
        ConfigError: the weights cannot be had, or do not fit the tower.
    """
    if config.vision.weights != NO_WEIGHTS:
        _load_vision(model, config)
    if config.text.weights != NO_WEIGHTS:
        _load_text(model, config)


def _load_vision(model: BridgeTower, config: ModelConfig) -> None:
    name, tag = config.vision.clip_name, config.vision.weights
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        raise ConfigError(
            f"model.vision.weights={tag}: open_clip has the weights {', '.join(known) or 'of no kind'} for "
            f"model.vision.clip_name={name}. Use one of them, or none for random weights."
        )
    try:
        weights = open_clip.create_model(name, pretrained=tag, precision="fp32").visual.state_dict()
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"The weights {tag} of {name} could not be loaded: {_first_line(error)}. They come from the hub; run once "
            "where it can be reached (they are cached), or use --model.vision.weights=none for random ones."
        ) from error
    weights.pop("proj", None)  # CLIP's projection, which BridgeTower never uses
    side = config.image_size_px // config.vision.patch_size_px
    weights["positional_embedding"] = resize_positions(weights["positional_embedding"], side)
    _load_strictly(model.vision_tower.vit, weights, f"{name} {tag}")


def _load_text(model: BridgeTower, config: ModelConfig) -> None:
    name = config.text.weights
    try:
        weights = RobertaModel.from_pretrained(name, add_pooling_layer=False, use_safetensors=True).state_dict()
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.weights={name} could not be loaded: {_first_line(error)}. Give a folder on disk or a name of "
            "the hub (run once where it can be reached), or none for random weights."
        ) from error
    _load_strictly(model.text_tower.roberta, weights, name)


def _load_strictly(tower: torch.nn.Module, weights: dict[str, Tensor], name: str) -> None:
    try:
        tower.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"The weights of {name} do not fit the configured tower. {error}") from error


def resize_positions(table_ND: Tensor, side: int) -> Tensor:
    """Resize a position table to another grid, as published: bicubic, corners not aligned, no antialiasing.

    Args:
        table_ND: row 0 for the class token, then a square grid, row by row.
        side: patches per side of the new grid.

    Returns: shape (1 + side * side, D).
    """
    old_side = round((len(table_ND) - 1) ** 0.5)
    if old_side == side:
        return table_ND
    grid_1DNN = table_ND[1:].reshape(old_side, old_side, -1).permute(2, 0, 1)[None].float()
    resized = F.interpolate(grid_1DNN, size=(side, side), mode="bicubic", align_corners=False)
    rows = resized[0].permute(1, 2, 0).reshape(side * side, -1).to(table_ND.dtype)
    return torch.cat([table_ND[:1], rows])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
