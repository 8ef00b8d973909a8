"""Pretrained weights for the towers, by name, strictly: each tensor has its place, or nothing is loaded.

Shapes: N grid side of the position table, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RobertaModel

from bridgetower.config.schema import ModelConfig
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower

NO_WEIGHTS = "none"
_LIST_MODELS = "`python -c 'import open_clip; print(open_clip.list_models())'`"


def load_tower_weights(model: BridgeTower, config: ModelConfig) -> None:
    """Fill the towers with the weights that the configuration names; ``none`` leaves them random.

    Raises:
        ConfigError: the weights cannot be had, or are those of another model than the tower.
    """
    if config.vision.weights != NO_WEIGHTS:
        _load_vision(model, config)
    if config.text.weights != NO_WEIGHTS:
        _load_text(model, config)


def _load_vision(model: BridgeTower, config: ModelConfig) -> None:
    name, source = config.vision.clip_name, config.vision.weights
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"model.vision.clip_name={name} is no model of open_clip. Near it are: {', '.join(near) or 'none'}; "
            f"{_LIST_MODELS} lists all."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if source not in tags and not Path(source).is_file():
        raise ConfigError(
            f"model.vision.weights={source} is neither a file nor weights that open_clip has for "
            f"model.vision.clip_name={name}: {', '.join(tags) or 'it has none'}. Use one of them, a file, or none for "
            "random weights."
        )
    try:
        loaded = open_clip.create_model(name, pretrained=source, precision="fp32").visual
    except Exception as error:  # the hub's client and torch raise many kinds
        raise ConfigError(
            f"The weights {source} of {name} could not be loaded: {_first_line(error)} A file must hold that model's "
            "weights and no others; a tag's come from the hub: run once where it can be reached (they are cached), or "
            "use --model.vision.weights=none for random ones."
        ) from error
    if not isinstance(loaded, VisionTransformer):
        raise ConfigError(
            f"model.vision.clip_name={name} has a {type(loaded).__name__} as its vision tower; BridgeTower reads the "
            f"states of open_clip's own ViT. Choose one of its models ViT-...; {_LIST_MODELS} lists all."
        )
    own = model.vision_tower.vit
    # None of these shows in the shapes of the weights.
    _check_same(
        f"{name} {source}",
        {
            "model.vision.num_heads": (own.transformer.resblocks[0].attn.num_heads, _heads(loaded)),
            "model.vision.activation": (config.vision.activation, _activation(loaded)),
            "LayerNorm epsilon (not a setting)": (own.ln_post.eps, loaded.ln_post.eps),
        },
    )
    weights = loaded.state_dict()
    weights.pop("proj", None)  # CLIP's projection, which BridgeTower never uses
    side = config.image_size_px // config.vision.patch_size_px
    weights["positional_embedding"] = resize_positions(weights["positional_embedding"], side)
    _load_strictly(own, weights, f"{name} {source}")


def _heads(vit: VisionTransformer) -> int:
    return int(vit.transformer.resblocks[0].attn.num_heads)


def _activation(vit: VisionTransformer) -> str:
    layer = vit.transformer.resblocks[0].mlp.gelu
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    return "gelu" if isinstance(layer, nn.GELU) and layer.approximate == "none" else repr(layer)


def _load_text(model: BridgeTower, config: ModelConfig) -> None:
    name = config.text.weights
    try:
        loaded, report = RobertaModel.from_pretrained(
            name, add_pooling_layer=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.weights={name} could not be loaded: {_first_line(error)} Give a folder on disk or a name of "
            "the hub (run once where it can be reached), or none for random weights."
        ) from error
    # transformers fills what a file lacks with random numbers and drops what it has too much. Heads may be too much.
    faults = _list("lack", report["missing_keys"]) + _list(
        "have beyond their config.json", [key for key in report["unexpected_keys"] if _is_of_tower(key)]
    )
    if faults:
        raise ConfigError(
            f"The weights model.text.weights={name} are not those of a whole RoBERTa: they {'; they '.join(faults)}. "
            "Copy the folder again, or choose another model."
        )
    own, theirs = model.text_tower.roberta.config, loaded.config
    _check_same(
        name,
        {
            "model.text.num_heads": (own.num_attention_heads, theirs.num_attention_heads),
            "activation (not a setting)": (own.hidden_act, theirs.hidden_act),
            "LayerNorm epsilon (not a setting)": (own.layer_norm_eps, theirs.layer_norm_eps),
            "padding id (not a setting)": (own.pad_token_id, theirs.pad_token_id),
        },
    )
    _load_strictly(model.text_tower.roberta, loaded.state_dict(), name)


def _is_of_tower(key: str) -> bool:
    # position_ids is a table of 0, 1, 2, ... that old versions of transformers stored.
    return key.removeprefix("roberta.").startswith(("embeddings.", "encoder.")) and not key.endswith("position_ids")


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
