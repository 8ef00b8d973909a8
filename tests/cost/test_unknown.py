"""What has no formula is an error that names the file to add it to, never a guess."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import pytest

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import BridgeForm, ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost import bridges, heads, published
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.micro_batch import count_micro_batch, count_operations
from bridgetower.cost.published import count_forward, count_published_step
from bridgetower.errors import ConfigError
from bridgetower.model.heads import HEADS
from bridgetower.model.sizes import complete_model_config
from bridgetower.model.text_tower import build_encoder, encoder_config
from tests.conftest import REPO

CAPTIONS = CaptionLengths((7, 8), (1, 1))
BOTH = ObjectivesConfig()


def with_changes(part: str, **changes: Any) -> ModelConfig:
    model = MODELS["base"]()
    return dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **changes)})


def cost_of(config: ModelConfig, objectives: ObjectivesConfig = BOTH) -> object:
    return count_micro_batch(config, objectives, ComputeConfig(), CAPTIONS, element_bytes=2)


@pytest.mark.parametrize("count", [cost_of, lambda config: count_published_step(config, BOTH)])
def test_a_bridge_form_without_a_formula_is_refused_with_the_file_and_the_known_forms(count):
    config = complete_model_config(with_changes("fusion", bridge="hyper_attention"))
    with pytest.raises(ConfigError, match=rf"bridge form 'hyper_attention'.*{bridges.FILE}.*add, product") as error:
        count(config)
    assert all(form in str(error.value) for form in get_args(BridgeForm))


def test_every_bridge_form_and_every_head_has_a_formula():
    assert set(bridges._FORMULAS) == set(get_args(BridgeForm))
    assert set(published._HEADS) == set(HEADS)


def test_files_that_errors_name_are_those_of_the_formulas():
    for module in (bridges, heads, published):
        assert (REPO / module.FILE).samefile(str(module.__file__))


def test_an_objective_without_a_formula_is_refused():
    class WithCaptioning(ObjectivesConfig):
        @property
        def heads(self) -> tuple[str, ...]:
            return ("mlm", "captioning")

    with pytest.raises(ConfigError, match=rf"objective 'captioning'.*{heads.FILE}.*mlm, itm, itc"):
        cost_of(complete_model_config(MODELS["base"]()), WithCaptioning())


def test_a_head_without_a_formula_is_refused():
    with pytest.raises(ConfigError, match=rf"head 'captioning'.*{published.FILE}.*mlm"):
        count_forward(complete_model_config(MODELS["base"]()), ("mlm", "captioning"), 13)


def test_a_vision_tower_of_timm_is_refused_with_towers_that_have_a_formula():
    config = complete_model_config(with_changes("vision", name="ViT-B-16-SigLIP"))
    for count in (cost_of, lambda config: count_operations(config, BOTH, CAPTIONS)):
        with pytest.raises(ConfigError, match=r"'ViT-B-16-SigLIP'.*known_towers\.py.*ViT-B-16-quickgelu"):
            count(config)


def test_a_text_tower_with_another_activation_has_operations_but_no_bytes(tmp_path):
    encoder = encoder_config(complete_model_config(MODELS["tiny"]()).text)
    encoder.hidden_act = "relu"
    build_encoder(encoder)  # transformers knows it
    (tmp_path / "config.json").write_text(json.dumps(encoder.to_dict()))
    tiny = MODELS["tiny"]()
    text = dataclasses.replace(tiny.text, name=str(tmp_path), dropout=0.0)
    config = complete_model_config(dataclasses.replace(tiny, text=text))
    with pytest.raises(ConfigError, match=r"activation.*'relu'.*gelu"):
        cost_of(config)
    assert count_operations(config, BOTH, CAPTIONS) == count_operations(complete_model_config(tiny), BOTH, CAPTIONS)
