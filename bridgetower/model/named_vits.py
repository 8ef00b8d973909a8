"""Vision towers by name: the ViTs of open_clip's models (its own and timm's), their sizes and pixel statistics.

open_clip and timm take seconds to import, so only the functions that need them import them. A custom tower, such as
that of the preset tiny, needs neither.
"""

from __future__ import annotations

import dataclasses
import difflib
from functools import lru_cache
from typing import Any

from bridgetower.config.model import CUSTOM, VisionTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.model.init import shapes_alone
from bridgetower.model.known_towers import VISION_TOWERS, is_known_vision
from bridgetower.model.named_sizes import fill_sizes

LIST_MODELS = "`python -c 'import open_clip; print(open_clip.list_models())'`"
_CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of each channel, for pixels in [0, 1], that CLIP's ViTs were trained with."""


def is_clip_tower(config: VisionTowerConfig) -> bool:
    """Return True for open_clip's own ViTs, False for timm's.

    Raises:
        ConfigError: open_clip has no model of that name.
    """
    return is_known_vision(config.name) or "timm_model_name" not in _model_config(config.name)["vision_cfg"]


def complete_vision_config(config: VisionTowerConfig) -> VisionTowerConfig:
    """Return the settings of a vision tower with the sizes of its named model.

    Raises:
        ConfigError: open_clip has no model of that name, its image tower is not a ViT that can be bridged, or a
            configured size differs from the model's.
    """
    if config.name == CUSTOM:
        return config
    return fill_sizes(config, "model.vision", _facts(config.name))


@lru_cache
def _facts(name: str) -> dict[str, int]:
    """Return the sizes of a named ViT: from a table, or read from the model itself on torch's meta device."""
    if name in VISION_TOWERS:
        return VISION_TOWERS[name]
    with shapes_alone():
        vit = build_named(name, None)
    is_clip = hasattr(vit, "conv1")
    blocks = vit.transformer.resblocks if is_clip else vit.blocks
    return {
        "patch_size_px": int(vit.patch_size[0] if is_clip else vit.patch_embed.feat_ratio(as_scalar=True)),
        "width": int(vit.conv1.out_channels if is_clip else vit.embed_dim),
        "num_layers": len(blocks),
        "num_heads": int(blocks[0].attn.num_heads),
    }


def build_named(name: str, image_size_px: int | None) -> Any:
    """Return the image tower of an open_clip model, up to the norm after its last block.

    Args:
        image_size_px: side of the images; None: the model's own size.

    Raises:
        ConfigError: open_clip has no model of that name, or its tower's states cannot be bridged.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    model_config = _model_config(name)
    cfg = CLIPVisionCfg(**model_config["vision_cfg"])
    if cfg.timm_model_name:
        return _build_timm(name, cfg.timm_model_name, image_size_px)
    if isinstance(cfg.layers, (list, tuple)):
        raise _unfit(name, "its image tower is a ResNet, whose layers have different shapes")
    if cfg.attentional_pool and model_config["embed_dim"] != cfg.width:
        raise _unfit(name, "the only norm after its blocks is one of the attention pool's output, of another width")
    size = {} if image_size_px is None else {"image_size": image_size_px}
    vit = _build_vision_tower(
        model_config["embed_dim"],
        dataclasses.replace(cfg, attentional_pool=False, patch_dropout=0.0, **size),
        quick_gelu=model_config.get("quick_gelu", False),
    )
    vit.proj = None
    return vit


def _build_timm(name: str, timm_name: str, image_size_px: int | None) -> Any:
    import timm

    size: dict[str, Any] = {} if image_size_px is None else {"img_size": image_size_px}
    # global_pool="": with pooling, timm would put the norm after the pool instead of after the last block.
    vit = timm.create_model(timm_name, pretrained=False, num_classes=0, global_pool="", **size)
    plain_vits = timm.models.VisionTransformer, timm.models.Eva, timm.models.VisionTransformerRelPos
    if not isinstance(vit, plain_vits):
        raise _unfit(name, f"its image tower is timm's {timm_name}, a {type(vit).__name__} and no plain ViT")
    return vit


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"model.vision.name={name} is not a model of open_clip. The nearest names are: "
            f"{', '.join(near) or 'none'}; {LIST_MODELS} lists all, and {CUSTOM} takes the sizes from the settings."
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def _unfit(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model.vision.name={name} cannot be bridged: {reason}. BridgeTower reads the states of a ViT's blocks. What "
        "fits: open_clip's ViT-*, EVA*, PE-*, MobileCLIP-B and *-SigLIP* models, e.g. ViT-B-16-quickgelu or "
        "ViT-B-16-SigLIP2."
    )


def pixel_statistics(config: VisionTowerConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, for pixels in [0, 1], that a tower was trained with.

    A tower without pretrained weights takes those of the first weights that open_clip lists for its name. A custom
    tower takes CLIP's.
    """
    if config.name == CUSTOM:
        return _CLIP_STATISTICS
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(config.name)
    if not tags:
        return _CLIP_STATISTICS
    mean, deviation = _CLIP_STATISTICS
    trained = open_clip.get_pretrained_cfg(config.name, config.weights if config.weights in tags else tags[0])
    return tuple(trained.get("mean", mean)), tuple(trained.get("std", deviation))
