"""Pretrained weights for the towers, by name, strictly: each tensor has its place, or nothing is loaded.

Shapes: N grid side of the position table, D width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.model import CUSTOM, VisionTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower

NO_WEIGHTS = "none"


def load_tower_weights(model: BridgeTower) -> None:
    """Fill the towers with the weights that the configuration names; ``none`` leaves them random.

    Raises:
        ConfigError: the weights cannot be had, or are those of another model than the tower.
    """
    check_vision_weights(model.config.vision)
    if model.config.vision.weights != NO_WEIGHTS:
        _load_vision(model)
    if model.config.text.weights != NO_WEIGHTS:
        _load_text(model)


def check_vision_weights(config: VisionTowerConfig) -> None:
    """Look the name of the weights up, which takes no time, before a model is built for them.

    Raises:
        ConfigError: open_clip does not know them for this tower, or they are of another activation.
    """
    name, source = config.name, config.weights
    if source == NO_WEIGHTS:
        return
    if name == CUSTOM:
        raise ConfigError(
            f"model.vision.weights={source} are of a model of open_clip, but model.vision.name={CUSTOM}. Give its "
            f"name, or use --model.vision.weights={NO_WEIGHTS} for random ones."
        )
    import open_clip  # takes seconds, which towers without named weights do not need

    tags = open_clip.list_pretrained_tags_by_model(name)
    if source not in tags and not Path(source).is_file():
        raise ConfigError(
            f"model.vision.weights={source} is neither a file nor weights that open_clip has for "
            f"model.vision.name={name}: {', '.join(tags) or 'it has none'}. Use one of them, a file, or none for "
            "random weights."
        )
    if source in tags:
        _check_activation(name, source)


def _load_vision(model: BridgeTower) -> None:
    import open_clip

    config = model.config.vision
    name, source = config.name, config.weights
    try:
        loaded = open_clip.create_model(name, pretrained=source, precision="fp32").visual.state_dict()
    except Exception as error:  # the hub's client and torch raise many kinds
        raise ConfigError(
            f"The weights {source} of {name} could not be loaded: {_first_line(error)} A file must hold that model's "
            "weights and no others; a tag's come from the hub: run once where it can be reached (they are cached), or "
            "use --model.vision.weights=none for random ones."
        ) from error
    weights = {renamed: value for key, value in loaded.items() if (renamed := _tower_key(key, config.num_layers))}
    own = model.vision_tower.vit
    for table in ("positional_embedding", "pos_embed"):
        if table in weights and getattr(own, table, None) is not None:
            weights[table] = fit_positions(weights[table], getattr(own, table), model.image_grid_side)
    _load_strictly(own, weights, f"{name} {source}")


def _check_activation(name: str, tag: str) -> None:
    """Refuse weights that were trained with the other GELU, of which open_clip only warns."""
    import open_clip

    needs = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    has = open_clip.get_model_config(name).get("quick_gelu", False)
    if needs and not has:
        raise ConfigError(
            f"The weights {tag} were trained with QuickGELU, which model.vision.name={name} does not have: they would "
            f"load and compute something else. Use --model.vision.name={name}-quickgelu."
        )


_BLOCK = re.compile(r"(?:transformer\.resblocks|blocks)\.(\d+)\.")
# What stands after the last block's norm: pools, projections and classifiers.
_AFTER_THE_TOWER = ("proj", "attn_pool.", "attn_pool_contrastive.", "head.")


def _tower_key(key: str, num_layers: int) -> str | None:
    """The name that a tensor of open_clip's image tower has in ours; None if ours has no place for it."""
    if key.startswith(("head.", "trunk.head.")):
        return None
    # A timm tower that pools before its norm calls it otherwise.
    key = key.removeprefix("trunk.").replace("fc_norm.", "norm.")
    block = _BLOCK.match(key)
    is_above = block is not None and int(block[1]) >= num_layers
    return None if is_above or key.startswith(_AFTER_THE_TOWER) else key


def _load_text(model: BridgeTower) -> None:
    config = model.config.text
    name, own = config.weights, model.text_tower.encoder
    try:
        loaded, report = type(own).from_pretrained(
            name, add_pooling_layer=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.weights={name} could not be loaded: {_first_line(error)} Give a folder on disk or a name of "
            "the hub (run once where it can be reached), or none for random weights."
        ) from error
    # transformers fills what a file lacks with random numbers and drops what it has too much. Heads may be too much.
    kind = own.config.model_type
    faults = _list("lack", report["missing_keys"]) + _list(
        "have beyond their config.json", [key for key in report["unexpected_keys"] if _is_of_tower(key, own)]
    )
    if faults:
        raise ConfigError(
            f"The weights model.text.weights={name} are not those of a whole {kind}: they {'; they '.join(faults)}. "
            "Copy the folder again, or choose another model."
        )
    theirs = loaded.config
    _check_same(
        name,
        {
            "model_type (of model.text.name)": (kind, theirs.model_type),
            "model.text.num_heads": (own.config.num_attention_heads, theirs.num_attention_heads),
            "activation (not a setting)": (own.config.hidden_act, theirs.hidden_act),
            "LayerNorm epsilon (not a setting)": (own.config.layer_norm_eps, theirs.layer_norm_eps),
            "padding id (not a setting)": (own.config.pad_token_id, theirs.pad_token_id),
        },
    )
    layer = re.compile(r"encoder\.layer\.(\d+)\.")
    # A named tower may be asked for with fewer layers than it has; a custom one must fit as it is.
    most = config.num_layers if config.name != CUSTOM else theirs.num_hidden_layers
    weights = {
        key: value
        for key, value in loaded.state_dict().items()
        if not (found := layer.match(key)) or int(found[1]) < most
    }
    _load_strictly(own, weights, name)


def _is_of_tower(key: str, tower: Any) -> bool:
    # position_ids is a table of 0, 1, 2, ... that old versions of transformers stored.
    bare = key.removeprefix(f"{tower.base_model_prefix}.")
    return bare.startswith(("embeddings.", "encoder.")) and not bare.endswith("position_ids")


def _check_same(name: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    for fact, (own, theirs) in facts.items():
        if own != theirs:
            raise ConfigError(
                f"The weights of {name} were trained with {fact} = {theirs}, the configured tower has {own}: they "
                "would load and compute something else. Configure the tower as they were trained, or choose others."
            )


def _load_strictly(tower: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    own = tower.state_dict()
    shapes = [
        f"{key} ({tuple(weights[key].shape)}, not {tuple(value.shape)})"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    faults = _list("lack", own.keys() - weights.keys()) + _list("have beyond it", weights.keys() - own.keys())
    faults += _list("have in another shape", shapes)
    if faults:
        raise ConfigError(
            f"The weights of {name} do not fit the configured tower: they {'; they '.join(faults)}. Set the tower's "
            "width, num_layers and other sizes to theirs, or choose others."
        )
    tower.load_state_dict(weights, strict=True)


def _list(verb: str, tensors: Collection[str]) -> list[str]:
    return [f"{verb} {len(tensors)} tensor(s) such as {min(tensors)}"] if tensors else []


def fit_positions(table: Tensor, own: Tensor, side: int) -> Tensor:
    """Resize a position table to that of a tower of another image size.

    Args:
        table: of shape (N, D) or (1, N, D), class and register rows first.
        own: the tower's table.
        side: patches per side of the tower's images.
    """
    num_prefix = own.shape[-2] - side * side
    resized = resize_positions(table.reshape(-1, table.shape[-1]), side, num_prefix)
    return resized.reshape(*table.shape[:-2], *resized.shape)


def resize_positions(table_ND: Tensor, side: int, num_prefix: int = 1) -> Tensor:
    """Resize a position table to another grid, as published: bicubic, corners not aligned, no antialiasing.

    Args:
        table_ND: rows of class (and register) tokens, then a square grid, row by row.
        side: patches per side of the new grid.
        num_prefix: rows before the grid, which stay as they are.

    Returns: shape (num_prefix + side * side, D).
    """
    old_side = round((len(table_ND) - num_prefix) ** 0.5)
    if old_side == side or old_side**2 != len(table_ND) - num_prefix:
        return table_ND  # what has no square grid will not fit, and is refused with its shape
    grid_1DNN = table_ND[num_prefix:].reshape(old_side, old_side, -1).permute(2, 0, 1)[None].float()
    resized = F.interpolate(grid_1DNN, size=(side, side), mode="bicubic", align_corners=False)
    rows = resized[0].permute(1, 2, 0).reshape(side * side, -1).to(table_ND.dtype)
    return torch.cat([table_ND[:num_prefix], rows])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
