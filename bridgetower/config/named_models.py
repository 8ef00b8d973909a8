"""Model settings by name: published models, the demo's, and every variant of the paper's Tables 1 to 3.

All have random initial weights; a run's settings say which weights its towers start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import get_args

from bridgetower.config.model import (
    CUSTOM,
    BridgeForm,
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextTowerConfig,
    VisionTowerConfig,
)


def tiny() -> ModelConfig:
    """The demo's model: a few million parameters, 72-pixel images."""
    width = 128
    return ModelConfig(
        image_size_px=72,
        # 16 patches, as the vision tower takes half of a step on a CPU.
        vision=VisionTowerConfig(name=CUSTOM, patch_size_px=18, width=width, num_layers=4, num_heads=4),
        text=TextTowerConfig(
            name=CUSTOM,
            tokenizer="emoji",
            vocabulary_size=1000,
            max_tokens=40,
            width=width,
            num_layers=3,
            num_heads=4,
            num_positions=64,
            dropout=0.0,  # the demo trains a dozen epochs, too few for a small model to overfit
        ),
        fusion=FusionConfig(width=width, num_layers=2, num_heads=4, dropout=0.0),
        heads=HeadsConfig(itc_width=128),
    )


def base() -> ModelConfig:
    """BridgeTower-Base: arXiv 2206.08657, section 4.1."""
    return ModelConfig(
        image_size_px=288,
        vision=VisionTowerConfig(name="ViT-B-16-quickgelu"),
        text=TextTowerConfig(name="roberta-base"),
        fusion=FusionConfig(width=768, num_heads=12, num_layers=6),
    )


def large() -> ModelConfig:
    """BridgeTower-Large: arXiv 2206.08657, section 4.1."""
    return ModelConfig(
        image_size_px=294,
        vision=VisionTowerConfig(name="ViT-L-14-quickgelu"),
        text=TextTowerConfig(name="roberta-large"),
        fusion=FusionConfig(width=1024, num_heads=16, num_layers=6),
    )


def _base_with(**fusion: object) -> ModelConfig:
    """Return the base model with other settings of ``fusion``."""
    model = base()
    return replace(model, fusion=replace(model.fusion, **fusion))  # type: ignore[arg-type]


def meter() -> ModelConfig:
    """METER as the BridgeTower authors re-implemented it: six external layers above the towers' last layers (0/6)."""
    return _base_with(num_external_layers=6)


def meter_fusion() -> ModelConfig:
    """METER with multi-layer fusion (0/6* in Table 3)."""
    return _base_with(num_external_layers=6, multi_layer_fusion=True)


def meter_original() -> ModelConfig:
    """METER as published: its vision tower lacks CLIP's last block."""
    model = meter()
    return replace(model, vision=replace(model.vision, num_layers=11))


def _table_1() -> dict[str, Callable[[], ModelConfig]]:
    """Return base_FORM for each form of the bridge."""
    return {f"base_{form}": partial(_base_with, bridge=form) for form in get_args(BridgeForm)}


def _table_2() -> dict[str, Callable[[], ModelConfig]]:
    """Return base_N_layers for each number of cross-modal layers."""
    return {f"base_{layers}_layers": partial(_base_with, num_layers=layers) for layers in range(13)}


def _table_3() -> dict[str, Callable[[], ModelConfig]]:
    """Return base_N_internal: N bridged layers and 6 - N external ones."""
    return {f"base_{6 - external}_internal": partial(_base_with, num_external_layers=external) for external in range(7)}


MODELS: Mapping[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "base": base,
    "large": large,
    "meter": meter,
    "meter_fusion": meter_fusion,
    "meter_original": meter_original,
    **_table_1(),
    **_table_2(),
    **_table_3(),
}
