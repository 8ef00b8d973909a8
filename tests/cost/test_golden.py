"""Golden numbers: what commit 3cc34ec counted before the formulas were split into files, equal to the last digit."""

from __future__ import annotations

import dataclasses

import pytest

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths, typical_captions
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.cost.published import count_published_step
from bridgetower.cost.step_work import step_work
from bridgetower.cost.work import CPU, CUDA, PARTS, StepCost
from bridgetower.model.sizes import complete_model_config

BOTH, ALL = ObjectivesConfig(), ObjectivesConfig(itc=True)
MLM, ITM = ObjectivesConfig(itm=False), ObjectivesConfig(mlm=False)
CAPTIONS = CaptionLengths((7, 9, 12, 20, 9, 8), (1, 0, 1, 3, 0, 2))


def model(name: str) -> ModelConfig:
    """A named model; "dry" is base without dropout, "padded" base with bridges that see padding."""
    base = MODELS["base"]()
    if name == "dry":
        text = dataclasses.replace(base.text, dropout=0.0)
        return complete_model_config(
            dataclasses.replace(base, text=text, fusion=dataclasses.replace(base.fusion, dropout=0.0))
        )
    if name == "padded":
        fusion = dataclasses.replace(base.fusion, bridge="cross_attention", bridge_masks_padding=False)
        return complete_model_config(dataclasses.replace(base, fusion=fusion))
    return complete_model_config(MODELS[name]())


def figures(cost: StepCost) -> tuple[int, ...]:
    first_gradient = cost.first_gradient
    return cost.kept, cost.work, cost.repeated, cost.workspace, cost.bridged, cost.passing, first_gradient


@pytest.mark.parametrize(
    ("name", "objectives", "recompute", "memory", "fuse_kernels", "expected"),
    [
        ("base", BOTH, (), CUDA, True, (1430713948, 2272660858368, 0, 77207040, 19169280, 23961600, 77207040)),
        (
            *("base", BOTH, PARTS, CUDA, True),
            (121616292, 2272660858368, 630324836352, 169574912, 19169280, 23961600, 77207040),
        ),
        (
            *("base", BOTH, ("vision",), CPU, True),
            (1178402660, 2272660858368, 244192665600, 77207040, 19169280, 23961600, 77207040),
        ),
        ("base", MLM, (), CUDA, True, (1032804084, 1695219992064, 0, 77207040, 18570240, 11980800, 77207040)),
        ("base", ITM, (), CUDA, False, (1066079344, 1707956748288, 0, 11980800, 18570240, 11980800, 0)),
        ("large", ALL, (), CUDA, True, (3662943420, 8113332983808, 0, 102942720, 34185216, 43450368, 102942720)),
        ("tiny", ALL, (), CPU, False, (7847384, 1654493184, 0, 256000, 118784, 208896, 256000)),
        ("meter_fusion", BOTH, (), CUDA, True, (1438017868, 2316826879488, 0, 77207040, 3194880, 23961600, 77207040)),
        (
            *("base_cross_attention_ffn", BOTH, PARTS, CPU, True),
            (121803864, 3187005101568, 935106250752, 381528248, 19169280, 23961600, 77207040),
        ),
        ("dry", BOTH, (), CPU, True, (1406314772, 2253018336768, 0, 77207040, 19169280, 23961600, 77207040)),
        ("padded", BOTH, (), CUDA, True, (1675864460, 2736448869888, 0, 77207040, 20183040, 23961600, 77207040)),
    ],
)
def test_cost_of_a_micro_batch_is_what_it_was(name, objectives, recompute, memory, fuse_kernels, expected):
    compute = ComputeConfig(recompute=recompute, fuse_kernels=fuse_kernels)
    cost = count_micro_batch(model(name), objectives, compute, CAPTIONS, element_bytes=2, memory=memory)
    assert figures(cost) == expected


@pytest.mark.parametrize(
    ("num_frozen", "recompute", "expected"),
    [
        ((2, 0), (), (8554545200, 14281906003968, 0, 127795200, 150829056, 127795200, 77207040)),
        ((2, 0), PARTS, (836001360, 14281906003968, 3741049012224, 907867360, 150829056, 127795200, 77207040)),
        ((0, 3), (), (9281464272, 15179952562176, 0, 127795200, 150829056, 127795200, 77207040)),
        ((-1, -1), PARTS, (810089872, 9290123452416, 1981258088448, 907867360, 150829056, 127795200, 77207040)),
        ((-1, 0), (), (4685994800, 9553803091968, 0, 127795200, 150829056, 127795200, 77207040)),
    ],
)
def test_cost_with_frozen_layers_and_images_of_negatives_is_what_it_was(num_frozen, recompute, expected):
    cost = count_micro_batch(
        model("base"),
        ALL,
        ComputeConfig(recompute=recompute),
        typical_captions(32, 12.0, 50, 0.15),
        element_bytes=2,
        num_images=48,
        num_frozen=num_frozen,
        num_contrasted=2048,
    )
    assert figures(cost) == expected


def test_published_step_and_work_per_pair_are_what_they_were():
    for name, objectives, expected in (
        ("base", BOTH, 693977084928),
        ("large", BOTH, 2556545470464),
        ("tiny", ALL, 892004352),
    ):
        assert sum(count_published_step(model(name), objectives).values()) == expected
    assert step_work(model("base"), BOTH) == (354637676620.8, 2168155929.6)
    assert step_work(model("large"), BOTH) == (1286888854425.6, 5890790707.2)
