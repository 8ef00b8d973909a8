"""The parameters that costs are counted for are those of the model that is trained."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.cost.parameters import build_shapes
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS
from bridgetower.model.init import shapes_alone
from bridgetower.model.plain import PlainBridgeTower
from bridgetower.model.sizes import complete_model_config

PRETRAINING = ("mlm", "itm", "itc")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def trained(config: ModelConfig, heads: tuple[str, ...]) -> BridgeTower:
    with shapes_alone():
        return BridgeTower(config, heads)


def tied() -> ModelConfig:
    model = MODELS["base"]()
    return dataclasses.replace(model, heads=dataclasses.replace(model.heads, mlm_tied=True))


@pytest.mark.parametrize("config", [*(build() for build in MODELS.values()), tied()], ids=[*MODELS, "tied"])
def test_every_named_model_has_the_parameters_of_the_plain_one(config):
    built = build_shapes(complete_model_config(config), PRETRAINING)
    assert isinstance(built, PlainBridgeTower) and shapes_of(built) == shapes_of(trained(config, PRETRAINING))


def with_towers(vision: str = "ViT-B-16", text: str = "roberta-base") -> ModelConfig:
    model = MODELS["base"]()
    vision_config = dataclasses.replace(model.vision, name=vision, num_layers=6)
    text_config = dataclasses.replace(model.text, name=text, num_layers=6)
    return dataclasses.replace(model, image_size_px=224, vision=vision_config, text=text_config)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (with_towers(text="bert-base-uncased"), ("mlm",)),
        (with_towers(vision="ViT-g-14"), ("mlm",)),
        (with_towers(vision="ViT-B-16-SigLIP"), ("mlm",)),
        (with_towers(), HEADS),
    ],
    ids=["BERT", "wider feed-forward", "timm", "all heads"],
)
def test_what_the_plain_model_cannot_hold_is_built_as_it_is_trained(config, heads):
    built = build_shapes(complete_model_config(config), heads)
    assert isinstance(built, BridgeTower) and shapes_of(built) == shapes_of(trained(config, heads))
