"""Small models that every other format can hold: attention heads of 64 channels, and one width."""

from __future__ import annotations

import torch

from bridgetower.config.model import CUSTOM, FusionConfig, HeadsConfig, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.model.bridgetower import BridgeTower
from tests.interop.port import fill


def port_like_config(
    *,
    width: int = 128,
    num_layers: int = 4,
    vision_layers: int | None = None,
    patch_size_px: int = 8,
    vocabulary_size: int = 50,
    num_positions: int = 20,
    layer_norm_eps: float = 1e-5,
    fusion_layers: int = 3,
    heads: HeadsConfig | None = None,
) -> ModelConfig:
    """Build a configuration of nine patches and, by default, three bridged layers."""
    return ModelConfig(
        image_size_px=3 * patch_size_px,
        vision=VisionTowerConfig(
            name=CUSTOM,
            patch_size_px=patch_size_px,
            width=width,
            num_layers=vision_layers or num_layers,
            num_heads=width // 64,
        ),
        text=TextTowerConfig(
            name=CUSTOM,
            vocabulary_size=vocabulary_size,
            max_tokens=min(50, num_positions - 2),
            width=width,
            num_layers=num_layers,
            num_heads=width // 64,
            num_positions=num_positions,
        ),
        fusion=FusionConfig(
            width=width, num_layers=fusion_layers, num_heads=width // 64, layer_norm_eps=layer_norm_eps
        ),
        heads=heads or HeadsConfig(),
    )


def filled(model: BridgeTower) -> BridgeTower:
    """Return the model in evaluation mode, after giving every parameter distinct values."""
    fill(model, 0.05)
    return model.eval()


def assert_same(one: BridgeTower, other: BridgeTower) -> None:
    """Assert that two models have the same configuration, heads and bits, and are in evaluation mode."""
    assert one.config == other.config
    assert list(one.heads) == list(other.heads)
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype and torch.equal(value, others[name]), name
    assert not one.training and not other.training
