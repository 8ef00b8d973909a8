"""Strict loading by this program's own names, as its exports and runs are opened."""

from __future__ import annotations

import dataclasses
import os
import stat

import pytest
import torch

from bridgetower.config.model import VisionTowerConfig
from bridgetower.errors import CheckpointError
from bridgetower.interop.safetensors_file import save_safetensors
from bridgetower.interop.strict import load_strictly
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS
from bridgetower.model.pretrained import resize_positions
from tests.interop.models import assert_same, filled
from tests.small_models import small_config


def test_every_tensor_of_a_model_is_loaded():
    model = filled(BridgeTower(small_config(), HEADS))
    assert_same(load_strictly(small_config(), HEADS, model.state_dict(), "runs/x"), model)


def test_the_weights_are_copied():
    weights = filled(BridgeTower(small_config())).state_dict()
    model = load_strictly(small_config(), (), weights, "runs/x")
    before = model.text_pooler.bias.clone()
    weights["text_pooler.bias"].zero_()
    assert torch.equal(model.text_pooler.bias, before)


def test_no_weight_is_left_uninitialised():
    # Initial values are not drawn, so a tensor that is not loaded would hold anything.
    model = load_strictly(small_config(), HEADS, filled(BridgeTower(small_config(), HEADS)).state_dict(), "runs/x")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    # Outside of loading, initial values are drawn again.
    assert BridgeTower(small_config()).text_transform.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_weights_of_two_dtypes_get_the_wider_one():
    weights = filled(BridgeTower(small_config())).state_dict()
    mixed = {name: value.bfloat16() if "pooler" in name else value for name, value in weights.items()}
    model = load_strictly(small_config(), (), mixed, "runs/x")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.text_pooler.weight, weights["text_pooler.weight"].bfloat16().float())


def test_faults_are_listed_with_the_source():
    weights = filled(BridgeTower(small_config())).state_dict()
    weights["text_pooler.bias"] = torch.zeros(3)
    weights["surplus"] = torch.zeros(1)
    del weights["image_pooler.bias"]
    with pytest.raises(CheckpointError, match=r"^runs/x does not hold exactly this model's tensors:\n") as caught:
        load_strictly(small_config(), (), weights, "runs/x")
    assert "1 missing: image_pooler.bias (40,)" in str(caught.value)
    assert "1 not expected: surplus (1,)" in str(caught.value)
    assert "1 of another shape: text_pooler.bias (3,), needed (40,)" in str(caught.value)


def test_a_head_of_a_later_version_is_refused():
    with pytest.raises(CheckpointError, match=r"runs/x has the head\(s\) dance, this program knows mlm"):
        load_strictly(small_config(), ("mlm", "dance"), {}, "runs/x")


def test_a_position_table_of_another_size_than_the_configurations_is_refused():
    weights = filled(BridgeTower(small_config())).state_dict()
    larger = dataclasses.replace(small_config(), image_size_px=40)
    with pytest.raises(CheckpointError, match=r"positional_embedding \(10, 48\), needed \(26, 48\)"):
        load_strictly(larger, (), weights, "runs/x")


def test_the_position_table_of_a_timm_tower_is_resized_too():
    tower = VisionTowerConfig(name="ViT-B-16-SigLIP", num_layers=1)
    config = dataclasses.replace(
        small_config(),
        image_size_px=48,
        vision=tower,
        fusion=dataclasses.replace(small_config().fusion, num_layers=1),
    )
    model = filled(BridgeTower(config))
    larger = load_strictly(config, (), model.state_dict(), "runs/x", image_size_px=80)
    saved = model.vision_tower.vit.pos_embed
    assert torch.equal(larger.vision_tower.vit.pos_embed[0], resize_positions(saved[0], 5, num_prefix=0))


def test_an_export_has_the_permissions_that_the_umask_gives(tmp_path):
    model = BridgeTower(small_config())
    before = os.umask(0o027)
    try:
        save_safetensors(model, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
