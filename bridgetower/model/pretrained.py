"""Loading pretrained tower weights by name, strictly: every tensor must match, or nothing is loaded.

Shapes: N rows of the position table (in ``grid_1DNN`` the side of its grid), D width.
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
    """Load the weights that the configuration names into the towers; ``none`` leaves a tower random.

    Raises:
        ConfigError: the weights cannot be loaded, or belong to a model that differs from the tower.
    """
    check_vision_weights(model.config.vision)
    if model.config.vision.weights != NO_WEIGHTS:
        _load_vision(model)
    if model.config.text.weights != NO_WEIGHTS:
        _load_text(model)


def check_vision_weights(config: VisionTowerConfig) -> None:
    """Check the name of the weights before a model is built for them; nothing is downloaded.

    Raises:
        ConfigError: open_clip does not have these weights for this tower, or they were trained with another activation.
    """
    name, source = config.name, config.weights
    if source == NO_WEIGHTS:
        return
    if name == CUSTOM:
        raise ConfigError(
            f"model.vision.weights={source} belong to an open_clip model, but model.vision.name={CUSTOM}. Set "
            f"model.vision.name to that model, or use --model.vision.weights={NO_WEIGHTS} for random weights."
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
            "weights and nothing else. The weights of a tag are downloaded: run once where there is network access "
            "(they are cached), or use --model.vision.weights=none for random weights."
        ) from error
    weights = {renamed: value for key, value in loaded.items() if (renamed := _tower_key(key, config.num_layers))}
    vit = model.vision_tower.vit
    for table in ("positional_embedding", "pos_embed"):
        if table in weights and getattr(vit, table, None) is not None:
            weights[table] = fit_positions(weights[table], getattr(vit, table), model.image_grid_side)
    _load_strictly(vit, weights, f"{name} {source}")


def _check_activation(name: str, tag: str) -> None:
    """Refuse weights that were trained with QuickGELU for a tower with GELU; open_clip only warns about it."""
    import open_clip

    needs = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    has = open_clip.get_model_config(name).get("quick_gelu", False)
    if needs and not has:
        raise ConfigError(
            f"The weights {tag} were trained with QuickGELU, which model.vision.name={name} does not have: they would "
            f"load and compute something else. Use --model.vision.name={name}-quickgelu."
        )


_BLOCK = re.compile(r"(?:transformer\.resblocks|blocks)\.(\d+)\.")
# Prefixes of what comes after the last block's norm: pools, projections and classifiers.
_AFTER_THE_TOWER = ("proj", "attn_pool.", "attn_pool_contrastive.", "head.")


def _tower_key(key: str, num_layers: int) -> str | None:
    """Return our name of a tensor of open_clip's image tower; None if our tower does not have it."""
    if key.startswith(("head.", "trunk.head.")):
        return None
    # timm calls the last norm fc_norm in towers that pool before it.
    key = key.removeprefix("trunk.").replace("fc_norm.", "norm.")
    block = _BLOCK.match(key)
    is_above = block is not None and int(block[1]) >= num_layers
    return None if is_above or key.startswith(_AFTER_THE_TOWER) else key


def _load_text(model: BridgeTower) -> None:
    config = model.config.text
    name, encoder = config.weights, model.text_tower.encoder
    try:
        loaded, report = type(encoder).from_pretrained(
            name, add_pooling_layer=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.weights={name} could not be loaded: {_first_line(error)} Give a folder on disk, a model of "
            "the Hugging Face hub (run once where there is network access), or none for random weights."
        ) from error
    # transformers initialises missing tensors at random and ignores unexpected ones. Only heads may be unexpected.
    model_type = encoder.config.model_type
    faults = _list("lack", report["missing_keys"]) + _list(
        "have beyond their config.json", [key for key in report["unexpected_keys"] if _is_tower_weight(key, encoder)]
    )
    if faults:
        raise ConfigError(
            f"The weights model.text.weights={name} are not those of a whole {model_type}: they "
            f"{'; they '.join(faults)}. Copy the folder again, or choose another model."
        )
    theirs = loaded.config
    _check_same(
        name,
        {
            "model_type (of model.text.name)": (model_type, theirs.model_type),
            "model.text.num_heads": (encoder.config.num_attention_heads, theirs.num_attention_heads),
            "activation (not a setting)": (encoder.config.hidden_act, theirs.hidden_act),
            "LayerNorm epsilon (not a setting)": (encoder.config.layer_norm_eps, theirs.layer_norm_eps),
            "padding id (not a setting)": (encoder.config.pad_token_id, theirs.pad_token_id),
        },
    )
    layer = re.compile(r"encoder\.layer\.(\d+)\.")
    # A named tower may be configured with fewer layers than its weights have; a custom one must match exactly.
    num_layers = config.num_layers if config.name != CUSTOM else theirs.num_hidden_layers
    weights = {
        key: value
        for key, value in loaded.state_dict().items()
        if not (match := layer.match(key)) or int(match[1]) < num_layers
    }
    _load_strictly(encoder, weights, name)


def _is_tower_weight(key: str, tower: Any) -> bool:
    # Old versions of transformers stored position_ids, a table of 0, 1, 2, ...
    bare = key.removeprefix(f"{tower.base_model_prefix}.")
    return bare.startswith(("embeddings.", "encoder.")) and not bare.endswith("position_ids")


def _check_same(name: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    for fact, (ours, theirs) in facts.items():
        if ours != theirs:
            raise ConfigError(
                f"The weights of {name} were trained with {fact} = {theirs}, the configured tower has {ours}: they "
                "would load and compute something else. Configure the tower as they were trained, or choose other "
                "weights."
            )


def _load_strictly(tower: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    tensors = tower.state_dict()
    shapes = [
        f"{key} ({tuple(weights[key].shape)}, not {tuple(value.shape)})"
        for key, value in tensors.items()
        if key in weights and weights[key].shape != value.shape
    ]
    faults = _list("lack", tensors.keys() - weights.keys()) + _list("have beyond it", weights.keys() - tensors.keys())
    faults += _list("have in another shape", shapes)
    if faults:
        raise ConfigError(
            f"The weights of {name} do not fit the configured tower: they {'; they '.join(faults)}. Set the tower's "
            "width, num_layers and other sizes to theirs, or choose other weights."
        )
    tower.load_state_dict(weights, strict=True)


def _list(verb: str, tensors: Collection[str]) -> list[str]:
    return [f"{verb} {len(tensors)} tensor(s) such as {min(tensors)}"] if tensors else []


def fit_positions(table: Tensor, tower_table: Tensor, side: int) -> Tensor:
    """Return a position table, resized to the image size of a tower.

    Args:
        table: shape (N, D) or (1, N, D), rows of class and register tokens first.
        tower_table: the tower's own table, whose shape says how many rows come before its grid.
        side: patches per side of the tower's images.
    """
    num_prefix = tower_table.shape[-2] - side * side
    resized = resize_positions(table.reshape(-1, table.shape[-1]), side, num_prefix)
    return resized.reshape(*table.shape[:-2], *resized.shape)


def resize_positions(table_ND: Tensor, side: int, num_prefix: int = 1) -> Tensor:
    """Return a position table, resized to another grid: bicubic, corners not aligned, no antialiasing.

    Args:
        table_ND: rows of class (and register) tokens, then a square grid, row by row.
        side: patches per side of the new grid.
        num_prefix: rows before the grid, which are copied.

    Returns: shape (num_prefix + side * side, D); the table itself if its grid is not square.
    Source: microsoft/BridgeTower, src/modules/clip_model.py (adapt_position_encoding).
    """
    old_side = round((len(table_ND) - num_prefix) ** 0.5)
    if old_side == side or old_side**2 != len(table_ND) - num_prefix:
        return table_ND  # _load_strictly refuses a table without a square grid, and names its shape
    grid_1DNN = table_ND[num_prefix:].reshape(old_side, old_side, -1).permute(2, 0, 1)[None].float()
    resized = F.interpolate(grid_1DNN, size=(side, side), mode="bicubic", align_corners=False)
    rows = resized[0].permute(1, 2, 0).reshape(side * side, -1).to(table_ND.dtype)
    return torch.cat([table_ND[:num_prefix], rows])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
