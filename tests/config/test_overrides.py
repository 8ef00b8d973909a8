"""Overrides: each type is parsed strictly, and a misspelt name is answered with the right one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from bridgetower.config.overrides import apply_overrides, from_dict, to_dict, walk_fields
from bridgetower.config.run import RunConfig
from bridgetower.errors import ConfigError
from pretrain.presets import PRESETS, base_4m, tiny


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = 1
    fraction: float = 0.5
    is_on: bool = False
    mode: Literal["slow", "fast"] = "slow"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of each type that settings have, and two that depend on each other."""

    folders: tuple[str, ...]
    label: str = ""
    low: int = 1
    high: int = 2
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"low={self.low} is not below high={self.high}")


START = Outer(folders=("a",))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("inner.count", "12", 12),
        ("inner.count", "-3", -3),
        ("inner.count", "100_000", 100_000),
        ("inner.count", "1e5", 100_000),
        ("inner.fraction", "2e-5", 2e-5),
        ("inner.fraction", "3", 3.0),
        ("inner.is_on", "true", True),
        ("inner.is_on", "True", True),  # fire gives this text for a bare --inner.is_on
        ("inner.is_on", "0", False),
        ("inner.is_on", "no", False),
        ("inner.mode", "fast", "fast"),
        ("label", "2024_11_22", "2024_11_22"),  # fire would read the integer 20241122
        ("label", "1e5", "1e5"),
        ("label", "true", "true"),
        ("label", "", ""),
        ("folders", "a,b", ("a", "b")),
        ("folders", "a, b", ("a", "b")),
        ("folders", "a", ("a",)),
        ("folders", "", ()),
    ],
)
def test_text_is_parsed_by_the_type_of_its_field(name, text, value):
    changed = apply_overrides(START, {name: text})
    parsed = {name: value for name, _, value, _ in walk_fields(changed)}[name]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "type_named"),
    [
        ("inner.count", "1.5", "integer"),
        ("inner.count", "many", "integer"),
        ("inner.count", "", "integer"),
        ("inner.count", "nan", "integer"),
        ("inner.count", "inf", "integer"),
        ("inner.count", "True", "integer"),
        ("inner.count", "²", "integer"),
        ("inner.fraction", "10%", "number"),
        ("inner.fraction", "1,5", "number"),
        ("inner.fraction", "true", "number"),
        ("inner.fraction", "nan", "number"),
        ("inner.fraction", "-inf", "number"),
        ("inner.is_on", "2", "true|false"),
        ("inner.is_on", "", "true|false"),
        ("inner.mode", "faster", "slow, fast"),
        ("inner.mode", "Slow", "slow, fast"),
    ],
)
def test_text_of_another_type_is_refused_with_its_name_value_and_type(name, text, type_named):
    with pytest.raises(ConfigError, match=re.escape(f"{name}={text}")) as error:
        apply_overrides(START, {name: text})
    assert type_named in str(error.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optim.base_lrr", "optim.base_lr"),
        ("optim.warm_up_fraction", "optim.warmup_fraction"),
        ("base_lr", "optim.base_lr"),
        ("total_steps", "optim.total_steps"),
        ("micro_batch_size", "data.micro_batch_size"),
        ("optim.micro_batch_size", "data.micro_batch_size"),
        ("model.num_positions", "model.text.num_positions"),
        ("sead", "seed"),
        ("nmae", "name"),
    ],
)
def test_misspelt_setting_is_answered_with_the_nearest_one(given, meant):
    with pytest.raises(ConfigError, match=rf"Unknown setting --{given}\. Did you mean --{re.escape(meant)}\?"):
        apply_overrides(base_4m(), {given: "1"})


def test_name_without_a_near_match_is_answered_with_help():
    with pytest.raises(ConfigError, match=r"Unknown setting --zebra\. --help lists all of them\."):
        apply_overrides(base_4m(), {"zebra": "1"})


def test_section_is_not_a_setting():
    with pytest.raises(ConfigError, match="Unknown setting --model"):
        apply_overrides(base_4m(), {"model": "large"})


def test_settings_are_set_together_so_that_only_the_result_must_be_consistent():
    # One after the other, low=5 would contradict high=2.
    assert apply_overrides(START, {"low": "5", "high": "9"}).low == 5
    with pytest.raises(ConfigError, match="low=5 is not below high=2"):
        apply_overrides(START, {"low": "5"})


def test_an_override_leaves_everything_else_as_it_was():
    before, after = to_dict(base_4m()), to_dict(apply_overrides(base_4m(), {"optim.base_lr": "2e-5"}))
    assert after["optim"].pop("base_lr") == 2e-5 and before["optim"].pop("base_lr") == 1e-5
    assert after == before


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_conversion_to_json_types_and_back(name):
    config = PRESETS[name]()
    assert from_dict(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("optim", "total_steps", 900.0),
        ("optim", "total_steps", "900"),
        ("optim", "total_steps", True),
        ("optim", "base_lr", "1e-5"),
        ("optim", "base_lr", True),
        ("objectives", "itc", 1),
        ("objectives", "itc", "true"),
        ("data", "train_shards", "shards/a"),
        ("data", "train_shards", [1]),
        ("optim", "implementation", "fussed"),
        ("tracker", "wandb_project", None),
    ],
)
def test_json_value_of_another_type_is_refused_and_never_converted(section, name, value):
    content = to_dict(tiny())
    content[section][name] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{name}="):
        from_dict(RunConfig, content)


def test_integer_in_json_is_accepted_as_a_number():
    content = to_dict(tiny())
    content["optim"]["max_grad_norm"] = 1
    assert isinstance(from_dict(RunConfig, content).optim.max_grad_norm, float)


def test_json_name_that_is_not_a_setting_is_refused_with_the_nearest_one():
    content = to_dict(tiny())
    content["optim"]["base_lrr"] = 1e-3
    with pytest.raises(ConfigError, match=r"optim\.base_lrr.*Did you mean optim\.base_lr\?"):
        from_dict(RunConfig, content)


def test_json_without_a_setting_that_has_no_default_is_refused():
    content = to_dict(tiny())
    del content["optim"]["total_steps"]
    with pytest.raises(ConfigError, match=r"setting optim\.total_steps is missing"):
        from_dict(RunConfig, content)


def test_json_value_instead_of_a_section_is_refused():
    content = to_dict(tiny())
    content["model"]["text"] = "roberta-base"
    with pytest.raises(ConfigError, match=r"model\.text='roberta-base' must be a section"):
        from_dict(RunConfig, content)
