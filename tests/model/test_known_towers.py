"""The tables of known towers against what open_clip and transformers build for the same names."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
from open_clip.transformer import VisionTransformer

from bridgetower.config.model import CUSTOM, TextTowerConfig, VisionTowerConfig
from bridgetower.config.named_models import MODELS
from bridgetower.errors import ConfigError
from bridgetower.model.init import shapes_alone
from bridgetower.model.known_towers import (
    TEXT_TOWERS,
    VISION_TOWERS,
    complete_known_model,
    is_bert,
    known_padding_id,
    known_text_name,
    vision_mlp_width,
)
from bridgetower.model.named_vits import build_named, complete_vision_config, is_clip_tower
from bridgetower.model.text_tower import complete_text_config, encoder_config
from bridgetower.model.vision_tower import ClipViT, VisionTower

NORMS_AND_EMBEDDINGS = {"class_embedding", "positional_embedding", "conv1", "ln_pre", "transformer", "ln_post"}


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_vision_tower_has_the_sizes_that_open_clip_builds(name):
    facts = VISION_TOWERS[name]
    assert is_clip_tower(VisionTowerConfig(name=name))
    config = open_clip.get_model_config(name)["vision_cfg"]
    with shapes_alone():
        vit = build_named(name, 4 * facts["patch_size_px"])
        tower = VisionTower(complete_vision_config(VisionTowerConfig(name=name)), 4 * facts["patch_size_px"])
    assert isinstance(vit, VisionTransformer) and isinstance(tower.vit, ClipViT)
    assert tower.vit.state_dict().keys() == vit.state_dict().keys()
    block = vit.transformer.resblocks[-1]
    assert facts == {
        "patch_size_px": vit.patch_size[0],
        "width": vit.conv1.out_channels,
        "num_layers": config["layers"],
        "num_heads": block.attn.num_heads,
    }
    assert vision_mlp_width(name, facts["width"]) == block.mlp.c_fc.out_features
    # The cost formulas assume every norm, learned positions, and no layer scale.
    assert {parameter.split(".")[0] for parameter, _ in vit.named_parameters()} == NORMS_AND_EMBEDDINGS
    assert vit.positional_embedding.requires_grad and "gamma" not in {
        parameter.split(".")[-1] for parameter, _ in block.named_parameters()
    }


def test_table_holds_every_vit_that_openai_released():
    openai = {name for name, tag in open_clip.list_pretrained() if tag == "openai" and name.startswith("ViT")}
    assert openai and openai <= set(VISION_TOWERS)


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_text_tower_has_the_sizes_that_transformers_has(name):
    config = encoder_config(TextTowerConfig(name=name))
    assert TEXT_TOWERS[name] == {
        "vocabulary_size": config.vocab_size,
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_positions": config.max_position_embeddings,
    }
    assert config.intermediate_size == 4 * config.hidden_size and config.hidden_act == "gelu"
    assert is_bert(name) == (config.model_type == "bert") and config.type_vocab_size == 1 + is_bert(name)
    assert is_bert(name) or config.pad_token_id == 1  # the first token has row 2 of the position table


@pytest.mark.parametrize("name", MODELS)
def test_tables_complete_a_named_model_as_the_libraries_do(name):
    config = MODELS[name]()
    vision, text = complete_vision_config(config.vision), complete_text_config(config.text)
    assert complete_known_model(config) == dataclasses.replace(config, vision=vision, text=text)


@pytest.mark.parametrize("config", [*(TextTowerConfig(name=name) for name in TEXT_TOWERS), MODELS["tiny"]().text])
def test_padding_id_of_a_known_tower_is_its_encoders(config):
    assert known_padding_id(config.name) == encoder_config(config).pad_token_id


def test_a_name_may_have_its_owner_in_front_and_a_folder_is_not_a_known_name(tmp_path, monkeypatch):
    assert known_text_name("FacebookAI/roberta-large") == "roberta-large" and known_text_name(CUSTOM) is None
    (tmp_path / "roberta-base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert known_text_name("roberta-base") is None


@pytest.mark.parametrize(
    ("part", "changes"),
    [("vision", {"name": "ViT-B-16-SigLIP"}), ("text", {"name": "some/encoder"}), ("text", {"max_tokens": 513})],
)
def test_models_that_are_not_in_the_tables_are_not_completed(part, changes):
    model = MODELS["base"]()
    changed = dataclasses.replace(getattr(model, part), **changes)
    assert complete_known_model(dataclasses.replace(model, **{part: changed})) is None


def test_a_size_that_is_not_the_named_towers_is_refused():
    model = MODELS["base"]()
    with pytest.raises(ConfigError, match=r"model\.vision\.width=512, but ViT-B-16-quickgelu has 768"):
        complete_known_model(dataclasses.replace(model, vision=dataclasses.replace(model.vision, width=512)))
