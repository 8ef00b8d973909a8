"""Sizes of the towers that are used most, so that costs and checks need neither open_clip nor transformers.

``tests/model/test_known_towers.py`` compares every row with the model that open_clip or transformers builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from bridgetower.config.model import CUSTOM, ModelConfig
from bridgetower.model.named_sizes import fill_sizes

_S = {"width": 384, "num_layers": 12, "num_heads": 6}
_M = {"width": 512, "num_layers": 12, "num_heads": 8}
_B = {"width": 768, "num_layers": 12, "num_heads": 12}
_B_PLUS = {"width": 896, "num_layers": 12, "num_heads": 14}
_L = {"width": 1024, "num_layers": 24, "num_heads": 16}
_H = {"width": 1280, "num_layers": 32, "num_heads": 16}
_G = {"width": 1408, "num_layers": 40, "num_heads": 16}
_BIG_G = {"width": 1664, "num_layers": 48, "num_heads": 16}
_E = {"width": 1792, "num_layers": 56, "num_heads": 16}

VISION_TOWERS: Mapping[str, dict[str, int]] = {
    name: {"patch_size_px": patch_size_px, **sizes}
    for patch_size_px, sizes, names in (
        (16, _S, ("ViT-S-16", "ViT-S-16-alt")),
        (32, _S, ("ViT-S-32", "ViT-S-32-alt")),
        (16, _M, ("ViT-M-16",)),
        (32, _M, ("ViT-M-32", "ViT-M-32-alt")),
        (16, _B, ("ViT-B-16", "ViT-B-16-quickgelu")),
        (18, _B, ("coca_base",)),
        (32, _B, ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-32-256", "roberta-ViT-B-32", "coca_roberta-ViT-B-32")),
        (32, _B, ("xlm-roberta-base-ViT-B-32", "mt5-base-ViT-B-32", "nllb-clip-base")),
        (16, _B_PLUS, ("ViT-B-16-plus", "ViT-B-16-plus-240")),
        (32, _B_PLUS, ("ViT-B-32-plus-256",)),
        (14, _L, ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-L-14-280", "ViT-L-14-336", "ViT-L-14-336-quickgelu")),
        (14, _L, ("ViT-L-14-worldwide", "ViT-L-14-worldwide-quickgelu")),
        (16, _L, ("ViT-L-16", "ViT-L-16-320")),
        (14, _H, ("ViT-H-14", "ViT-H-14-quickgelu", "ViT-H-14-378", "ViT-H-14-378-quickgelu")),
        (14, _H, ("ViT-H-14-worldwide", "ViT-H-14-worldwide-378", "ViT-H-14-worldwide-quickgelu")),
        (14, _H, ("xlm-roberta-large-ViT-H-14", "mt5-xl-ViT-H-14", "nllb-clip-large")),
        (16, _H, ("ViT-H-16",)),
        (14, _G, ("ViT-g-14",)),
        (14, _BIG_G, ("ViT-bigG-14", "ViT-bigG-14-quickgelu", "ViT-bigG-14-worldwide", "ViT-bigG-14-worldwide-378")),
        (14, _E, ("ViT-e-14",)),
    )
    for name in names
}
"""Sizes of CLIP's ViTs, by open_clip's name of the model: all that open_clip builds with code of its own, not timm's.

Each has a class token, a learned position table, norms before the first and after the last block, and no layer scale.
Variants that lack one of these (CLIPA, ViT-M-16-alt) are not in the table.
"""
# Hidden channels of the feed-forward layers where they are not four times the width.
_VISION_MLP_WIDTHS = {_G["width"]: 6144, _BIG_G["width"]: 8192, _E["width"]: 15360}

_ROBERTA = {"num_positions": 514, **_B}
_BERT = {"num_positions": 512, **_B}
TEXT_TOWERS: Mapping[str, dict[str, int]] = {
    "roberta-base": {"vocabulary_size": 50265, **_ROBERTA},
    "roberta-large": {"vocabulary_size": 50265, **_ROBERTA, **_L},
    "distilroberta-base": {"vocabulary_size": 50265, **_ROBERTA, "num_layers": 6},
    "xlm-roberta-base": {"vocabulary_size": 250002, **_ROBERTA},
    "xlm-roberta-large": {"vocabulary_size": 250002, **_ROBERTA, **_L},
    "bert-base-uncased": {"vocabulary_size": 30522, **_BERT},
    "bert-base-cased": {"vocabulary_size": 28996, **_BERT},
    "bert-large-uncased": {"vocabulary_size": 30522, **_BERT, **_L},
}
"""Sizes by the hub's name, without its owner. All feed-forward layers have four times the width's channels."""
TEXT_OWNERS = ("FacebookAI/", "distilbert/", "google-bert/")
"""Owners on the hub, which a name may begin with."""
# Rows of a RoBERTa's position table that no token takes: its pad id, and the rows before it.
_UNREAD_POSITIONS = 2


def known_text_name(name: str) -> str | None:
    """Return the key of TEXT_TOWERS that a name stands for; None for a folder and for other encoders."""
    bare = next((name.removeprefix(owner) for owner in TEXT_OWNERS if name.startswith(owner)), name)
    return bare if bare in TEXT_TOWERS and not Path(name).is_dir() else None


def is_known_vision(name: str) -> bool:
    """Return whether the sizes of a vision tower follow from its name and settings."""
    return name == CUSTOM or name in VISION_TOWERS


def is_known_text(name: str) -> bool:
    """Return whether the sizes of a text tower follow from its name and settings."""
    return name == CUSTOM or known_text_name(name) is not None


def is_bert(name: str) -> bool:
    """Return whether a known text tower is a BERT, which has two token types and reads all of its position table."""
    return (known_text_name(name) or "").startswith("bert-")


def known_padding_id(name: str) -> int | None:
    """Return the id that padding has in a known text tower, else None; a custom tower is a RoBERTa."""
    if not is_known_text(name):
        return None
    return 0 if is_bert(name) else 1


def vision_mlp_width(name: str, width: int) -> int:
    """Return the hidden channels of the feed-forward layers of a known vision tower."""
    return 4 * width if name == CUSTOM else _VISION_MLP_WIDTHS.get(width, 4 * width)


def complete_known_model(config: ModelConfig) -> ModelConfig | None:
    """Fill in the sizes that the names of both towers stand for, from the tables of this file.

    Returns: None if a tower is not in the tables, or reads fewer tokens than model.text.max_tokens;
        ``bridgetower.model.sizes.complete_model_config`` then asks open_clip and transformers.

    Raises:
        ConfigError: a size that is given is not the named tower's, or the parts do not fit.
    """
    vision, text = config.vision, config.text
    if not (is_known_vision(vision.name) and is_known_text(text.name)):
        return None
    if vision.name != CUSTOM:
        vision = fill_sizes(vision, "model.vision", VISION_TOWERS[vision.name])
    text_name = known_text_name(text.name)
    if text_name is not None:
        text = fill_sizes(text, "model.text", TEXT_TOWERS[text_name])
        unread = 0 if is_bert(text.name) else _UNREAD_POSITIONS
        if text.max_tokens > text.num_positions - unread:
            return None
    return dataclasses.replace(config, vision=vision, text=text)
