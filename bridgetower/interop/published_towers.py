"""The towers of the published model: their configuration from their sizes, and why another tower is not one of them."""

from __future__ import annotations

import dataclasses

from bridgetower.config.model import CUSTOM, TextTowerConfig, VisionTowerConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import shapes_alone
from bridgetower.model.named_vits import complete_vision_config
from bridgetower.model.text_tower import complete_text_config
from bridgetower.model.vision_tower import ClipViT, VisionTower, blocks_of, is_quick_gelu

HEAD_WIDTH = 64
"""Channels of an attention head, in all towers of CLIP and RoBERTa, and in the published cross-modal layers."""
TOWER_EPS = 1e-5
"""Of the norms of both towers, of the bridges, and of the norms before the first cross-modal layer."""

_CLIP_NAMES = ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-B-32-quickgelu")
_ROBERTA_NAMES = ("roberta-base", "roberta-large")


def clip_tower(*, patch_size_px: int, width: int, num_layers: int) -> VisionTowerConfig:
    """A CLIP ViT of these sizes, by OpenAI's name if it has one. METER leaves out the last block."""
    sizes = {"patch_size_px": patch_size_px, "width": width, "num_heads": width // HEAD_WIDTH}
    for name in _CLIP_NAMES:
        known = complete_vision_config(VisionTowerConfig(name=name))
        if all(getattr(known, field) == value for field, value in sizes.items()):
            if num_layers == known.num_layers:
                return VisionTowerConfig(name=name)
            if num_layers == known.num_layers - 1:
                return VisionTowerConfig(name=name, num_layers=num_layers)
    return VisionTowerConfig(
        name=CUSTOM, patch_size_px=patch_size_px, width=width, num_layers=num_layers, num_heads=width // HEAD_WIDTH
    )


def roberta_tower(
    *,
    vocabulary_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_positions: int,
    max_tokens: int,
    dropout: float,
) -> TextTowerConfig:
    """A RoBERTa of these sizes, by its name if it has one."""
    sizes = {
        "vocabulary_size": vocabulary_size,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_positions": num_positions,
    }
    tokens = min(max_tokens, num_positions - 2)
    for name in _ROBERTA_NAMES:
        known = complete_text_config(TextTowerConfig(name=name))
        if all(getattr(known, field) == value for field, value in sizes.items()):
            return TextTowerConfig(name=name, max_tokens=tokens, dropout=dropout)
    return TextTowerConfig(
        name=CUSTOM,
        vocabulary_size=vocabulary_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_positions=num_positions,
        max_tokens=tokens,
        dropout=dropout,
    )


def why_no_clip(model: BridgeTower) -> list[str]:
    """What keeps a model's vision tower from being one of OpenAI's CLIP."""
    config, vit = model.config.vision, model.vision_tower.vit
    if not isinstance(vit, ClipViT):
        return [f"model.vision.name={config.name} is no ViT of CLIP"]
    same_sizes = dataclasses.replace(config, name=CUSTOM, weights="none")
    with shapes_alone():
        clip = VisionTower(same_sizes, model.config.image_size_px).state_dict()
    own = model.vision_tower.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in clip.items()}:
        return [f"model.vision.name={config.name} has other tensors than a ViT of CLIP"]
    reasons = []
    if not all(is_quick_gelu(block.mlp.gelu) for block in blocks_of(vit)):
        reasons.append(f"model.vision.name={config.name} has GELU, and CLIP's ViT QuickGELU")
    if config.num_heads != config.width // HEAD_WIDTH:
        reasons.append(
            f"model.vision.num_heads={config.num_heads}, and CLIP's ViT has model.vision.width / {HEAD_WIDTH} = "
            f"{config.width // HEAD_WIDTH}"
        )
    return reasons


def why_no_roberta(model: BridgeTower) -> list[str]:
    """What keeps a model's text tower from being a RoBERTa."""
    theirs = model.text_tower.encoder.config
    expected = {
        "model_type": "roberta",
        "hidden_act": "gelu",
        "layer_norm_eps": TOWER_EPS,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "intermediate_size": 4 * theirs.hidden_size,
    }
    return [
        f"the text tower model.text.name={model.config.text.name} has {field}={getattr(theirs, field)}, and RoBERTa "
        f"{value}"
        for field, value in expected.items()
        if getattr(theirs, field) != value
    ]
