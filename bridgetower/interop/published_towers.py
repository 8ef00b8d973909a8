"""The towers of the published models, CLIP's ViT and RoBERTa: found by their sizes, and compared with other towers."""

from __future__ import annotations

import dataclasses

from bridgetower.config.model import CUSTOM, TextTowerConfig, VisionTowerConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import shapes_alone
from bridgetower.model.named_vits import complete_vision_config
from bridgetower.model.text_tower import complete_text_config
from bridgetower.model.vision_tower import ClipViT, VisionTower, blocks_of, is_quick_gelu

HEAD_WIDTH = 64
"""Channels per attention head in every tower of CLIP and RoBERTa, and in the published cross-modal layers."""
TOWER_EPS = 1e-5
"""Epsilon of the LayerNorms in both towers, in the bridges, and before the first cross-modal layer."""

_CLIP_NAMES = ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-B-32-quickgelu")
_ROBERTA_NAMES = ("roberta-base", "roberta-large")


def find_clip_config(*, patch_size_px: int, width: int, num_layers: int) -> VisionTowerConfig:
    """Return the configuration of a CLIP ViT of these sizes: by OpenAI's name if one has them, else a custom tower.

    One layer fewer than a named tower has is that tower without its last block, which METER leaves out.
    """
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


def find_roberta_config(
    *,
    vocabulary_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_positions: int,
    max_tokens: int,
    dropout: float,
) -> TextTowerConfig:
    """Return the configuration of a RoBERTa of these sizes: by its name if one has them, else a custom tower.

    Args:
        num_positions: rows of the position table. RoBERTa never uses its first two for tokens.
        max_tokens: tokens per text; capped at what the position table holds.
    """
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


def list_clip_mismatches(model: BridgeTower) -> list[str]:
    """List how a model's vision tower differs from OpenAI's CLIP ViT, one clause per difference."""
    config, vit = model.config.vision, model.vision_tower.vit
    if not isinstance(vit, ClipViT):
        return [f"model.vision.name={config.name} is not a CLIP ViT"]
    # A custom tower is CLIP's plain ViT: a named one with other tensors (LayerScale, RoPE, ...) differs from it.
    same_sizes = dataclasses.replace(config, name=CUSTOM, weights="none")
    with shapes_alone():
        clip = VisionTower(same_sizes, model.config.image_size_px).state_dict()
    tensors = model.vision_tower.state_dict()
    if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in clip.items()}:
        return [f"model.vision.name={config.name} has other tensors than a CLIP ViT"]
    reasons = []
    if not all(is_quick_gelu(block.mlp.gelu) for block in blocks_of(vit)):
        reasons.append(f"model.vision.name={config.name} has GELU, and CLIP's ViT has QuickGELU")
    if config.num_heads != config.width // HEAD_WIDTH:
        reasons.append(
            f"model.vision.num_heads={config.num_heads}, and CLIP's ViT has model.vision.width / {HEAD_WIDTH} = "
            f"{config.width // HEAD_WIDTH}"
        )
    return reasons


def list_roberta_mismatches(model: BridgeTower) -> list[str]:
    """List how a model's text tower differs from RoBERTa, one clause per difference."""
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
        f"has {value}"
        for field, value in expected.items()
        if getattr(theirs, field) != value
    ]
