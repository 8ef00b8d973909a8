"""Settings that contradict each other are found when a configuration is built, and the error suggests a repair."""

from __future__ import annotations

import dataclasses
import re

import pytest

from bridgetower.config.overrides import apply_overrides, walk_fields
from bridgetower.errors import ConfigError
from pretrain.presets import PRESETS, tiny

REFUSED = [
    # (overrides of `tiny`, what the error says about the value, what it suggests)
    ({"model.image_size_px": "70"}, "70 is not a multiple of model.vision.patch_size_px=18", "Use 54 or 72"),
    ({"model.image_size_px": "10"}, "model.image_size_px=10 is not a multiple", "Use 18 or 36"),
    ({"model.fusion.num_layers": "4"}, "bridges 4 layers, more than the text tower has (3)", "num_layers=3 or fewer"),
    ({"model.fusion.num_layers": "5"}, "more than the text tower has (3)", "num_layers=3 or fewer"),
    ({"model.fusion.num_layers": "-1"}, "model.fusion.num_layers=-1", "0 or more"),
    ({"model.fusion.num_external_layers": "3"}, "model.fusion.num_external_layers=3", "from 0 to"),
    ({"model.fusion.multi_layer_fusion": "yes"}, "model.fusion.multi_layer_fusion=True", "num_external_layers=2"),
    ({"model.fusion.num_layers": "0", "model.fusion.width": "64"}, "model.vision.width=128", "Make them equal"),
    ({"model.heads.mlm_tied": "yes", "model.fusion.width": "64"}, "model.heads.mlm_tied=True", "Make them equal"),
    ({"model.vision.name": "custom", "model.vision.width": "0"}, "model.vision.width=0", "give its name"),
    ({"model.fusion.num_heads": "3"}, "width=128 is not a multiple of model.fusion.num_heads=3", "num_heads=4 or 2"),
    ({"model.vision.num_heads": "3"}, "model.vision.num_heads=3", "num_heads=4 or 2"),
    ({"model.text.num_heads": "5"}, "model.text.num_heads=5", "num_heads=4 or 2"),
    ({"model.vision.patch_size_px": "0"}, "model.vision.patch_size_px=0", "greater than 0"),
    ({"model.fusion.layer_norm_eps": "0"}, "model.fusion.layer_norm_eps=0.0", "greater than 0"),
    ({"model.text.max_tokens": "63"}, "model.text.max_tokens=63", "num_positions - 2 = 62"),
    ({"model.text.max_tokens": "2"}, "model.text.max_tokens=2", "from 3"),
    ({"model.text.dropout": "1"}, "model.text.dropout=1.0 is not in [0, 1)", "10 % is written 0.1"),
    ({"model.fusion.dropout": "-0.1"}, "model.fusion.dropout=-0.1 is not in [0, 1)", "10 % is written 0.1"),
    ({"objectives.mlm": "no", "objectives.itm": "no"}, "both off", "Switch at least one on"),
    ({"objectives.mlm_probability": "0"}, "mlm_probability=0.0 is not in (0, 1)", "the paper uses 0.15"),
    ({"model.heads.itc_initial_temperature": "14"}, "temperature=14.0 is not in [0.001, 0.5]", "the paper uses 0.07"),
    ({"model.heads.itc_width": "-1"}, "model.heads.itc_width=-1", "greater than 0"),
    ({"data.train_shards": ""}, "data.train_shards is empty", "--data.train_shards=DIR"),
    ({"data.workers": "-1"}, "data.workers=-1", "0 or more"),
    ({"data.shards_per_window": "0"}, "data.shards_per_window=0", "greater than 0"),
    ({"data.micro_batch_size": "0"}, "data.micro_batch_size=0", "greater than 0"),
    ({"data.global_batch_size": "-64"}, "data.global_batch_size=-64", "greater than 0"),
    ({"optim.base_lr": "0"}, "optim.base_lr=0.0", "greater than 0"),
    ({"optim.total_steps": "0"}, "optim.total_steps=0", "greater than 0"),
    ({"optim.fusion_lr_scale": "-5"}, "optim.fusion_lr_scale=-5.0", "greater than 0"),
    ({"optim.beta2": "1"}, "optim.beta2=1.0 is not in [0, 1)", "It is a fraction"),
    ({"optim.weight_decay": "-0.01"}, "optim.weight_decay=-0.01", "0 (off) or more"),
    ({"optim.max_grad_norm": "-1"}, "optim.max_grad_norm=-1.0", "0 (off) or more"),
    # A number of steps where a fraction is expected: the error says the fraction.
    ({"optim.total_steps": "100000", "optim.warmup_fraction": "1000"}, "warmup_fraction=1000.0", "steps write 0.01"),
    ({"engine.threads_per_rank": "-1"}, "engine.threads_per_rank=-1", "0 (divide the cores) or more"),
    ({"evaluation.batch_size": "0"}, "evaluation.batch_size=0", "greater than 0"),
    ({"evaluation.max_images": "-1"}, "evaluation.max_images=-1", "0 or more"),
    ({"evaluation.max_images": "1"}, "evaluation.max_images=1", "0 (all) or 2 or more"),
    ({"checkpoint.every_steps": "0"}, "checkpoint.every_steps=0", "greater than 0"),
    ({"checkpoint.keep_last": "-1"}, "checkpoint.keep_last=-1", "0 (keep all) or more"),
    ({"tracker.every_steps": "0"}, "tracker.every_steps=0", "greater than 0"),
    ({"name": ""}, "name=''", "a folder name"),
    ({"name": "../elsewhere"}, "name='../elsewhere'", "The folder above is run_root"),
    ({"name": ".."}, "name='..'", "a folder name"),
    ({"seed": "-1"}, "seed=-1", "0 or more"),
]


@pytest.mark.parametrize(("overrides", "wrong", "suggestion"), REFUSED, ids=[",".join(row[0]) for row in REFUSED])
def test_contradiction_is_refused_with_its_value_and_a_suggestion(overrides, wrong, suggestion):
    with pytest.raises(ConfigError, match=re.escape(wrong)) as error:
        apply_overrides(tiny(), overrides)
    assert suggestion in str(error.value)


def test_repair_that_an_error_suggests_is_accepted():
    # What rows of REFUSED suggest.
    good = {"model.image_size_px": "54", "model.fusion.num_layers": "3", "model.text.max_tokens": "62"}
    assert apply_overrides(tiny(), good).model.image_size_px == 54


def test_one_of_the_two_objectives_of_the_cross_modal_encoder_is_enough():
    assert apply_overrides(tiny(), {"objectives.itm": "no"}).objectives.mlm


@pytest.mark.parametrize("name", PRESETS)
def test_no_setting_of_a_run_can_be_changed_afterwards(name):
    config = PRESETS[name]()
    sections = [config, *(section for section in vars(config).values() if dataclasses.is_dataclass(section))]
    for section in sections:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)


def test_every_setting_has_a_name_of_its_own():
    names = [name for name, *_ in walk_fields(tiny())]
    assert len(names) == len(set(names))
