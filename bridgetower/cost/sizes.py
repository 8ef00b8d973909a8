"""Sizes of a model that costs are computed from, read without building the model where that is possible."""

from __future__ import annotations

from bridgetower.config.model import ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.cost.unknown import no_formula
from bridgetower.model.known_towers import (
    VISION_TOWERS,
    is_known_text,
    is_known_vision,
    vision_mlp_width,
)

_GELU = "gelu"


def has_formula(vision: VisionTowerConfig) -> bool:
    """Return whether the layers of a vision tower have a formula; other towers are counted by running them."""
    return is_known_vision(vision.name)


def check_formula(vision: VisionTowerConfig) -> None:
    """Stop at a vision tower whose cost is unknown.

    Raises:
        ConfigError: there is no formula for its layers.
    """
    if not has_formula(vision):
        raise no_formula(
            "layers of the vision tower", vision.name, "bridgetower/model/known_towers.py", ("custom", *VISION_TOWERS)
        )


def mlp_width_of_vision(vision: VisionTowerConfig) -> int:
    """Return the hidden channels of the feed-forward layers of a vision tower that has a formula."""
    return vision_mlp_width(vision.name, vision.width)


def mlp_width_of_text(text: TextTowerConfig) -> int:
    """Return the hidden channels of the feed-forward layers of a text tower."""
    if is_known_text(text.name):
        return 4 * text.width
    from bridgetower.model.text_tower import encoder_config

    return int(encoder_config(text).intermediate_size)


def check_activation(text: TextTowerConfig) -> None:
    """Stop at a text tower whose activation keeps other bytes than GELU, which keeps its input and its output.

    Raises:
        ConfigError: there is no formula for the activation.
    """
    if is_known_text(text.name):
        return
    from bridgetower.model.text_tower import encoder_config

    activation = str(encoder_config(text).hidden_act)
    if activation != _GELU:
        raise no_formula(f"activation of {text.name}", activation, "bridgetower/cost/layers.py", (_GELU,))


def num_read_states(config: ModelConfig, num_layers: int) -> int:
    """Return how many of a tower's last layers are read: the bridged ones, all for METER's fusion, else the last.

    Args:
        num_layers: of the tower.
    """
    return num_layers if config.fusion.multi_layer_fusion else max(1, config.fusion.num_bridged)


def num_image_positions(config: ModelConfig) -> int:
    """Return the positions of an image in a vision tower that has a formula: its patches and the class token."""
    return int((config.image_size_px // config.vision.patch_size_px) ** 2 + 1)
