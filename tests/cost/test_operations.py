"""Operations per pair by formula, against those that torch counts in a real step on the meta device."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.step_sides import with_dropout
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig, VisionTowerConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.counted import count_vision_tower
from bridgetower.cost.micro_batch import count_micro_batch, count_operations
from bridgetower.cost.step_work import step_work
from bridgetower.cost.work import PARTS
from bridgetower.model.sizes import complete_model_config
from tests.cost.counting import BOTH, count_step


def spread(mean: float, pairs: int) -> list[int]:
    """Whole numbers with that mean, as even as possible."""
    return [math.floor(mean * (pair + 1)) - math.floor(mean * pair) for pair in range(pairs)]


# Pairs as in a micro-batch of the four corpora, <s> and </s> counted: 12 tokens and 1.5 masked ones on average.
LENGTHS = [6, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 14, 14, 15, 15, 16, 17, 18, 20, 22]
LENGTHS += [9, 8, 10]
CAPTIONS = CaptionLengths(tuple(LENGTHS), tuple(spread(1.5, len(LENGTHS))))
# Some captions without a masked token, and a bucket of similar captions that has none at all.
SHORT = CaptionLengths(tuple(sorted(LENGTHS)[::4]), (0, 0, 1, 2, 1, 2, 3, 0))


@pytest.mark.parametrize(("name", "most"), [("base", 382.3), ("large", 1361.4)])
def test_a_change_that_adds_operations_to_the_step_is_noticed(name, most):
    # The floor with everything shared is 378 and 1,352; dropout keeps rows of one image from sharing its first
    # self-attention.
    assert np.mean(CAPTIONS.num_tokens) == 12
    counted = count_step(MODELS[name](), CAPTIONS)
    assert most - 2 < counted / 1e9 <= most
    formula = count_operations(complete_model_config(MODELS[name]()), BOTH, CAPTIONS)
    assert formula / len(CAPTIONS.num_tokens) == pytest.approx(counted, rel=1e-9)


def without_layers_below_the_bridges(config: ModelConfig) -> ModelConfig:
    """A model as small as it can be: those layers cost the same each."""
    layers = config.fusion.num_layers
    vision = dataclasses.replace(config.vision, num_layers=layers)
    return dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, num_layers=layers))


@pytest.mark.parametrize(
    ("name", "dropout"), [("tiny", 0.1), ("tiny", 0.0), ("base", 0.0), ("base", 0.1), ("large", 0.1)]
)
def test_formula_is_what_is_counted(name, dropout):
    config = with_dropout(complete_model_config(MODELS[name]()), dropout)
    if name == "tiny":
        config = without_layers_below_the_bridges(config)
    formula = count_operations(config, BOTH, SHORT)
    assert formula / len(SHORT.num_tokens) == pytest.approx(count_step(config, SHORT), rel=1e-9)


@pytest.mark.parametrize("bridge", ["cross_attention", "cross_attention_ffn"])
def test_formula_is_what_is_counted_where_a_bridge_sees_padding(bridge):
    tiny = MODELS["tiny"]()
    fusion = dataclasses.replace(tiny.fusion, bridge=bridge, bridge_masks_padding=False)
    config = complete_model_config(dataclasses.replace(tiny, fusion=fusion))
    formula = count_operations(config, BOTH, SHORT)
    assert formula / len(SHORT.num_tokens) == pytest.approx(count_step(config, SHORT), rel=1e-9)
    packed = dataclasses.replace(fusion, bridge_masks_padding=True)
    assert formula > count_operations(dataclasses.replace(config, fusion=packed), BOTH, SHORT)


@pytest.mark.parametrize("name", ["ViT-bigG-14", "ViT-g-14"])
def test_formula_is_what_is_counted_where_feed_forward_layers_are_wider(name):
    vision = VisionTowerConfig(name=name, num_layers=2)
    config = complete_model_config(dataclasses.replace(MODELS["tiny"](), image_size_px=56, vision=vision))
    formula = count_operations(config, BOTH, SHORT)
    assert formula / len(SHORT.num_tokens) == pytest.approx(count_step(config, SHORT), rel=1e-9)


def test_work_of_each_component_is_what_docs_performance_md_says():
    pieces = count_micro_batch(
        complete_model_config(MODELS["base"]()), BOTH, ComputeConfig(), CAPTIONS, element_bytes=2
    ).pieces
    gflop = {name: work / len(CAPTIONS.num_tokens) / 1e9 for name, work in pieces.items()}
    assert gflop == pytest.approx(
        {
            "vision_tower": 178.1,
            "image_transform": 6.9,
            "text_tower": 12.8,
            "bridges": 0.0,
            "text_stream": 12.8,
            "image_stream": 171.2,
            "heads": 0.4,
        },
        abs=0.06,
    )


def test_recomputing_every_layer_costs_at_most_29_percent_more():
    captions = CaptionLengths(CAPTIONS.num_tokens[::4], CAPTIONS.num_masked[::4])
    once, again = (
        count_step(MODELS["base"](), captions, compute=ComputeConfig(recompute=parts)) for parts in ((), PARTS)
    )
    assert 1.2 < again / once <= 1.29


def test_work_per_pair_is_linear_in_the_length_of_its_caption():
    tokens, masked = [8] * 8 + [10] * 8 + [13] * 8 + [17] * 8, [1] * 16 + [2] * 16
    captions = CaptionLengths(tuple(tokens), tuple(masked))
    work = step_work(MODELS["base"](), BOTH)
    assert work.of_pair(float(np.mean(tokens))) == pytest.approx(count_step(MODELS["base"](), captions), rel=0.005)


def without_class_token() -> ModelConfig:
    """A tiny model with a vision tower of timm, which has no formula."""
    vision = VisionTowerConfig(name="PE-Core-T-16-384", num_layers=4)
    return dataclasses.replace(MODELS["tiny"](), image_size_px=64, vision=vision)


def test_a_vision_tower_of_timm_is_counted_and_the_rest_is_by_formula():
    config = complete_model_config(without_class_token())
    counted = count_vision_tower(config)
    expected = count_step(config, SHORT, objectives=ObjectivesConfig(itc=True))
    formula = count_operations(config, ObjectivesConfig(itc=True), SHORT, counted)
    assert formula / len(SHORT.num_tokens) == pytest.approx(expected, rel=1e-9)
    assert counted.backward > counted.forward > 0


def test_work_with_a_vision_tower_of_timm_is_that_of_a_real_step():
    counted = count_step(without_class_token(), CaptionLengths((7, 7), (1, 1)))
    assert step_work(without_class_token(), BOTH).of_pair(7) == pytest.approx(counted, rel=1e-9)
