"""Checkpoints of the published code, read and written: same bits, no tensor skipped, no code run."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgetower.config.model import CUSTOM, FusionConfig, HeadsConfig, ModelConfig, TextTowerConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.published_towers import find_clip_config, find_roberta_config
from bridgetower.interop.reference import build_reference_tensors, from_reference, to_reference
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.pretrained import resize_positions
from tests.interop.models import assert_same, filled, port_like_config


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def published_config(**sizes) -> ModelConfig:
    return port_like_config(**{"layer_norm_eps": 1e-12, **sizes})


def published_model(heads=("mlm", "itm"), **sizes) -> BridgeTower:
    return filled(BridgeTower(published_config(**sizes), heads))


def meter_config(*, fusion: bool = False, vision_layers: int = 3, nlvr2_scale: float = 1.5) -> ModelConfig:
    heads = HeadsConfig(classifier_scale=1, nlvr2_scale=nlvr2_scale)
    config = published_config(vision_layers=vision_layers, heads=heads)
    external = dataclasses.replace(config.fusion, num_external_layers=3, multi_layer_fusion=fusion)
    return dataclasses.replace(config, fusion=external)


# Models with the heads of each published task.

# Tensors that the published code registers and never reads.
UNREAD = {
    "text_transformer.embeddings.position_ids",
    "text_transformer.pooler.dense.weight",
    "text_transformer.pooler.dense.bias",
    "vit_model.positional_embedding",
    "vit_model.ln_final.weight",
    "vit_model.ln_final.bias",
}
SMALL_ITC = HeadsConfig(itc_width=24)
MODELS = {
    "pretraining": (published_config(), ("mlm", "itm")),
    "pretraining with contrast": (published_config(heads=SMALL_ITC), ("mlm", "itm", "itc")),
    "retrieval with contrast": (published_config(heads=SMALL_ITC), ("itm", "itc")),
    "VQA": (published_config(heads=HeadsConfig(num_answers=17)), ("vqa",)),
    "VQA from scratch": (published_config(heads=HeadsConfig(num_answers=17, classifier_scale=1)), ("vqa",)),
    "SNLI-VE": (published_config(), ("snli_ve",)),
    "NLVR2": (published_config(), ("nlvr2",)),
    "retrieval by rank": (published_config(), ("itm", "rank")),
    "no head": (published_config(), ()),
    "one layer": (published_config(fusion_layers=1), ("mlm", "itm")),
    "no cross-modal layer": (published_config(fusion_layers=0), ("itm",)),
    "METER": (meter_config(vision_layers=4), ("mlm", "itm")),
    "METER without the last block": (meter_config(), ("mlm", "itm")),
    "METER with fusion of layers": (meter_config(fusion=True, vision_layers=4), ("mlm", "itm")),
    "METER for NLVR2": (meter_config(nlvr2_scale=1), ("nlvr2",)),
    "METER for VQA": (meter_config(fusion=True), ("vqa",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_unchanged_from_a_published_checkpoint(name, tmp_path):
    config, heads = MODELS[name]
    model = filled(BridgeTower(config, heads))
    path = tmp_path / "model.ckpt"
    to_reference(model, path)
    # What no shape shows is in the file's settings, or has the published value.
    assert_same(from_reference(path), model)
    assert_same(from_reference(str(path), config=config), model)
    assert names_in(tmp_path) == ["model.ckpt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_bit_is_lost_in_any_floating_point_dtype(dtype, tmp_path):
    model = published_model(("mlm", "itc")).to(dtype)
    to_reference(model, tmp_path / "model.ckpt")
    assert_same(from_reference(tmp_path / "model.ckpt"), model)


def test_a_written_file_is_a_lightning_checkpoint_with_the_published_settings(tmp_path):
    model = published_model(("mlm", "itm"))
    to_reference(model, tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert {"state_dict", "hyper_parameters", "epoch", "global_step", "pytorch-lightning_version"} <= content.keys()
    settings = content["hyper_parameters"]["config"]
    assert settings["model_type"] == "BT" and not settings["meter_fusion"] and not settings["vit_remove_last"]
    assert (settings["hidden_size"], settings["num_heads"], settings["num_layers"]) == (128, 2, 3)
    assert {name for name, weight in settings["loss_names"].items() if weight} == {"mlm", "itm"}
    tensors = content["state_dict"]
    assert torch.equal(tensors["text_transformer.embeddings.position_ids"], torch.arange(20)[None])
    assert tensors["temperature"].shape == () and tensors["temperature"] == pytest.approx(0.07)
    assert not tensors["text_transformer.pooler.dense.weight"].any()
    # CLIP's text tower is as wide as in OpenAI's models, or as the vision tower where that has another width.
    assert tensors["vit_model.positional_embedding"].shape == (77, 128)


def test_the_names_of_a_pretraining_checkpoint_are_the_published_ones():
    # Written out for 4 tower layers and 3 cross-modal layers, and not with the table of names, which is under test.
    both = [f"{{}}.{parameter}" for parameter in ("weight", "bias")]

    def with_both(*stems: str) -> set[str]:
        return {pattern.format(stem) for stem in stems for pattern in both}

    expected = {
        "text_transformer.embeddings.position_ids",
        "text_transformer.embeddings.word_embeddings.weight",
        "text_transformer.embeddings.position_embeddings.weight",
        "text_transformer.embeddings.token_type_embeddings.weight",
        "vit_model.positional_embedding",
        "vit_model.visual.class_embedding",
        "vit_model.visual.positional_embedding",
        "vit_model.visual.conv1.weight",
        "token_type_embeddings.weight",
        "temperature",
        "mlm_score.bias",
        "mlm_score.decoder.weight",
    }
    expected |= with_both("text_transformer.embeddings.LayerNorm", "text_transformer.pooler.dense")
    expected |= with_both("vit_model.ln_final", "vit_model.visual.ln_pre", "vit_model.visual.ln_post")
    expected |= with_both("mlm_score.transform.dense", "mlm_score.transform.LayerNorm", "itm_score.fc")
    for i in range(4):
        layer, block = f"text_transformer.encoder.layer.{i}", f"vit_model.visual.transformer.resblocks.{i}"
        expected |= with_both(*(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")))
        expected |= with_both(f"{layer}.attention.output.dense", f"{layer}.attention.output.LayerNorm")
        expected |= with_both(f"{layer}.intermediate.dense", f"{layer}.output.dense", f"{layer}.output.LayerNorm")
        expected |= with_both(f"{block}.attn.out_proj", f"{block}.ln_1", f"{block}.ln_2")
        expected |= with_both(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj")
        expected |= {f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"}
    for m in ("text", "image"):
        expected |= with_both(
            f"cross_modal_{m}_transform", f"cross_modal_{m}_pooler.dense", f"cross_modal_{m}_layernorm"
        )
        expected |= with_both(*(f"cross_modal_{m}_link_tower.{k}.LayerNorm" for k in range(2)))
        for j in range(3):
            layer = f"cross_modal_{m}_layers.{j}"
            for attention in ("attention", "crossattention"):
                expected |= with_both(*(f"{layer}.{attention}.self.{part}" for part in ("query", "key", "value")))
                expected |= with_both(f"{layer}.{attention}.output.dense", f"{layer}.{attention}.output.LayerNorm")
            expected |= with_both(f"{layer}.intermediate.dense", f"{layer}.output.dense", f"{layer}.output.LayerNorm")
    assert set(build_reference_tensors(published_model())) == expected


# Files as Lightning writes them.


def lightning_1_5(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of a checkpoint that pytorch-lightning 1.5.10 saves in a run of the published code.

    Callbacks without a state (LearningRateMonitor) are left out. The settings are plain dictionaries, because they went
    through sacred and a deep copy. The moments are those of AdamW, the schedule is torch's LambdaLR.

    Source: pytorch-lightning 1.5.10, trainer/connectors/checkpoint_connector.py:335-408 and
    callbacks/model_checkpoint.py:255-263 and 351-364.
    """
    model = nn.Linear(2, 2)
    decayed, free = {"params": [model.weight], "weight_decay": 0.01}, {"params": [model.bias], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, free])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state_key = (
        "ModelCheckpoint{'monitor': 'val/the_metric', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None, 'save_on_train_epoch_end': False}"
    )
    return {
        "epoch": 9,
        "global_step": 100000,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": tensors,
        "callbacks": {state_key: checkpoint_callback()},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "config": {
                "vit": "CLIP-ViT-B/16",
                "loss_names": {"itm": 1, "mlm": 1, "itc": 0},
                "datasets": ["coco", "vg", "sbu", "gcc"],
                "load_path": "",
                "resume_from": None,
                "num_heads": 2,
                "drop_rate": 0.1,
                "max_text_len": 50,
            }
        },
    }


def checkpoint_callback() -> dict[str, Any]:
    """Return the state of Lightning's ModelCheckpoint."""
    return {
        "monitor": "val/the_metric",
        "best_model_score": torch.tensor(1.5),
        "best_model_path": "checkpoints/BT_09_1.5.ckpt",
        "current_score": torch.tensor(1.5),
        "dirpath": "checkpoints",
        "best_k_models": {"checkpoints/BT_09_1.5.ckpt": torch.tensor(1.5)},
        "kth_best_model_path": "checkpoints/BT_09_1.5.ckpt",
        "kth_value": torch.tensor(1.5),
        "last_model_path": "",
    }


@pytest.fixture
def old_lightning(monkeypatch):
    """Return a class as pytorch-lightning 1.3.2 keys the state of callbacks by (trainer/callback_hook.py:278)."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for package in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    callback_class = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback_class, raising=False)
    return callback_class


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_everything_that_lightning_saves_is_read(zipped, tmp_path):
    model = published_model()
    content = lightning_1_5(build_reference_tensors(model))
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(from_reference(tmp_path / "last.ckpt"), model)


def test_an_original_meter_checkpoint_is_read(old_lightning, tmp_path):
    # It has one block fewer than the text tower, no temperature, CLIP's word embeddings, and a class as a key.
    model = filled(BridgeTower(meter_config(), ("mlm", "itm")))
    tensors = build_reference_tensors(model)
    del tensors["temperature"]
    tensors["vit_model.token_embedding.weight"] = torch.zeros(49408, 128)
    content = lightning_1_5(tensors) | {
        "pytorch-lightning_version": "1.3.2",
        "callbacks": {old_lightning: checkpoint_callback()},
    }
    torch.save(content, tmp_path / "meter.ckpt")
    loaded = from_reference(tmp_path / "meter.ckpt")
    assert (loaded.config.vision.num_layers, loaded.config.text.num_layers) == (3, 4)
    assert loaded.config.fusion.num_bridged == 0
    assert_same(loaded, model)


def test_a_file_of_a_state_dict_alone_is_read(tmp_path):
    model = published_model()
    torch.save(build_reference_tensors(model), tmp_path / "weights.pth")
    assert_same(from_reference(tmp_path / "weights.pth"), model)


def test_the_numbered_norms_of_early_checkpoints_are_read(tmp_path):
    model = published_model()
    tensors = {}
    for name, value in build_reference_tensors(model).items():
        for m in ("text", "image"):
            name = name.replace(f"cross_modal_{m}_layernorm.", f"cross_modal_{m}_layernorm.0.")
            for k in range(2):
                name = name.replace(f"cross_modal_{m}_link_tower.{k}.LayerNorm.", f"cross_modal_{m}_layernorm.{k + 1}.")
        tensors[name] = value
    assert "cross_modal_image_layernorm.2.bias" in tensors and not any("link_tower" in name for name in tensors)
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt")
    assert_same(from_reference(tmp_path / "old.ckpt"), model)


def test_the_number_of_attention_heads_is_read_from_the_settings_of_the_file(tmp_path):
    config = published_config()
    model = filled(BridgeTower(dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, num_heads=8))))
    to_reference(model, tmp_path / "model.ckpt")
    assert from_reference(tmp_path / "model.ckpt").config.fusion.num_heads == 8
    torch.save({"state_dict": build_reference_tensors(model)}, tmp_path / "bare.ckpt")
    assert from_reference(tmp_path / "bare.ckpt").config.fusion.num_heads == 2  # 64 channels each, as published


@pytest.mark.parametrize(("side", "patches"), [(40, 5), (16, 2)])
def test_the_position_table_is_resized_as_published(side, patches, tmp_path):
    model = published_model()
    to_reference(model, tmp_path / "model.ckpt")
    larger = from_reference(tmp_path / "model.ckpt", image_size_px=side)
    saved = model.vision_tower.vit.positional_embedding
    assert larger.config.image_size_px == side
    assert torch.equal(larger.vision_tower.vit.positional_embedding, resize_positions(saved, patches))
    other = dataclasses.replace(model.config, image_size_px=side)
    assert_same(from_reference(tmp_path / "model.ckpt", config=other), larger)
    with pytest.raises(ConfigError, match="image_size_px=41 is not a multiple"):
        from_reference(tmp_path / "model.ckpt", image_size_px=41)


def test_a_norm_under_both_names_is_refused(tmp_path):
    tensors = build_reference_tensors(published_model())
    tensors["cross_modal_text_layernorm.0.bias"] = torch.zeros(128)
    torch.save(tensors, tmp_path / "both.ckpt")
    with pytest.raises(CheckpointError, match=r"1 not expected: cross_modal_text_layernorm\.0\.bias"):
        from_reference(tmp_path / "both.ckpt")


# Strictness.


def test_no_tensor_that_is_read_may_be_missing(tmp_path):
    tensors = build_reference_tensors(published_model(("mlm", "itm", "itc"), num_layers=1, fusion_layers=1))
    path = tmp_path / "model.ckpt"
    refused = set()
    for name in tensors:
        torch.save({other: value for other, value in tensors.items() if other != name}, path)
        try:
            from_reference(path)
        except CheckpointError:
            refused.add(name)
    assert refused == tensors.keys() - UNREAD


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path):
    tensors = build_reference_tensors(published_model())
    del tensors["cross_modal_text_layers.2.crossattention.self.key.bias"]
    del tensors["itm_score.fc.bias"]
    tensors["cross_modal_text_layers.1.output.dense.scale"] = torch.zeros(3)
    tensors["mlm_score.bias"] = torch.zeros(51)
    tensors["text_transformer.embeddings.position_ids"] = torch.arange(21)[None]  # unused, but not of that shape
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError) as caught:
        from_reference(tmp_path / "model.ckpt")
    message = str(caught.value)
    assert "2 missing: " in message
    assert "cross_modal_text_layers.2.crossattention.self.key.bias (128,)" in message
    assert "itm_score.fc.bias (2,)" in message
    assert "1 not expected: cross_modal_text_layers.1.output.dense.scale (3,)" in message
    assert "2 of another shape: " in message
    assert "mlm_score.bias (51,), needed (50,)" in message
    assert "text_transformer.embeddings.position_ids (1, 21), needed (1, 20)" in message


@pytest.mark.parametrize(
    "unused",
    [
        "text_transformer.embeddings.position_ids",
        "text_transformer.pooler.dense.weight",
        "vit_model.ln_final.bias",
        "vit_model.positional_embedding",
        "temperature",
    ],
)
def test_a_tensor_that_nothing_reads_may_be_missing(unused, tmp_path):
    model = published_model()
    tensors = build_reference_tensors(model)
    del tensors[unused]
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    assert_same(from_reference(tmp_path / "model.ckpt"), model)


def test_the_temperature_of_a_model_with_an_itc_head_may_not_be_missing(tmp_path):
    tensors = build_reference_tensors(published_model(("itc",)))
    del tensors["temperature"]
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"1 missing: temperature \(\)"):
        from_reference(tmp_path / "model.ckpt")


def test_a_configuration_of_another_model_is_refused(tmp_path):
    to_reference(published_model(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"missing: .*cross_modal_text_layers\.3\."):
        from_reference(tmp_path / "model.ckpt", config=published_config(fusion_layers=4))


def test_many_faults_are_counted_and_not_all_listed(tmp_path):
    to_reference(published_model(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"not expected: .*; and \d+ more"):
        from_reference(tmp_path / "model.ckpt", config=published_config(fusion_layers=1))


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["bridgetower.text_model.pooler.dense.bias"], "names of Hugging Face's port"),
        (["vision_tower.vit.conv1.weight"], "bridgetower.load_model"),
        (["module.vit_model.visual.conv1.weight"], "Remove that prefix"),
        (["vit_model.patch_embed.proj.weight"], "Swin or a ViT of timm"),
        (["weight"], r"its 1 tensors \(weight, \.\.\.\)"),
    ],
)
def test_another_kind_of_file_is_refused_with_what_it_is(names, hint, tmp_path):
    torch.save({"state_dict": {name: torch.zeros(1) for name in names}}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=f"no checkpoint of the published.* {hint}"):
        from_reference(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": [1]}, {"epoch": 1}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="holds no state_dict of tensors"):
        from_reference(tmp_path / "model.ckpt")


def test_a_classifier_of_one_layer_is_refused(tmp_path):
    tensors = build_reference_tensors(published_model(("itm",)))
    tensors |= {"vqa_classifier.0.weight": torch.zeros(17, 256), "vqa_classifier.0.bias": torch.zeros(17)}
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"vqa_classifier of one layer \(task_head_layers=1\)"):
        from_reference(tmp_path / "model.ckpt")


def test_a_width_that_does_not_show_the_attention_heads_needs_a_configuration(tmp_path):
    config = published_config()
    narrow = dataclasses.replace(config, fusion=FusionConfig(width=96, num_layers=3, num_heads=3))
    model = filled(BridgeTower(narrow, ("mlm", "itm")))
    to_reference(model, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"fusion of .* width of 96"):
        from_reference(tmp_path / "model.ckpt")
    assert_same(from_reference(tmp_path / "model.ckpt", config=narrow), model)


# Files that are damaged or carry code.


class Evil:
    """Unpickling an instance calls a function."""

    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("position", ["state_dict", "hyper_parameters", "alone"])
def test_a_file_that_carries_code_is_refused_and_its_code_is_not_run(form, position, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    evil = Evil(os.mkdir, str(trace))
    content: dict[str, Any] = {"state_dict": build_reference_tensors(published_model()), "hyper_parameters": {}}
    if position == "state_dict":
        content["state_dict"]["itm_score.fc.bias"] = evil
    elif position == "hyper_parameters":
        content["hyper_parameters"] = {"config": evil}
    harmful = evil if position == "alone" else content
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(harmful, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=rf"to import {os.mkdir.__module__}\.mkdir, which could run code"):
        from_reference(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file carries no code"


@pytest.mark.parametrize("call", [eval, exec, __import__, getattr, os.system])
def test_no_builtin_that_runs_code_is_let_through(call, tmp_path):
    torch.save({"state_dict": {}, "callbacks": Evil(call, "1")}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=f"to import .*{call.__name__}, which could run code"):
        from_reference(tmp_path / "model.ckpt")


def test_an_instance_of_the_one_class_that_is_let_through_is_an_empty_placeholder(old_lightning, tmp_path):
    model = published_model()
    content = lightning_1_5(build_reference_tensors(model))
    instance = old_lightning()
    instance.__dict__["payload"] = [1]
    torch.save(content | {"callbacks": {"a": instance}}, tmp_path / "model.ckpt")
    assert_same(from_reference(tmp_path / "model.ckpt"), model)


def test_a_script_module_and_a_tar_are_refused_without_torchs_advice_to_open_them_otherwise(tmp_path, recwarn):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.ckpt")
    with tarfile.open(tmp_path / "old.ckpt", "w") as tar:
        (tmp_path / "storages").write_bytes(pickle.dumps(1))
        for part in ("storages", "tensors", "pickle"):
            tar.add(tmp_path / "storages", part)
    recwarn.clear()  # torch.jit.script is deprecated
    for name in ("script.ckpt", "old.ckpt"):
        with pytest.raises(CheckpointError, match=r"not a complete file of torch\.save"):
            from_reference(tmp_path / name)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_file_that_is_not_there_or_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt cannot be read \(No such file"):
        from_reference(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory"):
        from_reference(tmp_path)
    contents = {
        "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "is a web page": b"\n<!DOCTYPE html><html>Server failed to authenticate the request</html>",
        "is empty": b"",
        "not a complete file of torch.save": b"hello, I am plain text",
    }
    for message, content in contents.items():
        (tmp_path / "model.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            from_reference(tmp_path / "model.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(zipped, fraction, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": build_reference_tensors(published_model())}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(CheckpointError, match=r"not a complete file of torch\.save"):
        from_reference(path)


# Options that the published code has no setting for.


def _fusion(**changes):
    return lambda config: dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, **changes))


def _vision(**changes):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


def _heads(**changes):
    return lambda config: dataclasses.replace(config, heads=dataclasses.replace(config.heads, **changes))


def _bert(config: ModelConfig) -> ModelConfig:
    text = TextTowerConfig(name="bert-base-uncased", num_layers=3)
    return dataclasses.replace(config, text=text)


UNFIT = {
    "bridge=product": (_fusion(bridge="product"), ()),
    "num_external_layers=1": (_fusion(num_external_layers=1), ()),
    "mlm_tied=true": (_heads(mlm_tied=True), ("mlm",)),
    "widths of towers and fusion differ": (_fusion(width=192, num_heads=3), ("itc",)),
    "classifier_scale=1.5": (_heads(classifier_scale=1.5), ("vqa",)),
    "beside another classifier": (_heads(), ("nlvr2", "vqa")),
    "nlvr2_scale=1.0": (_heads(nlvr2_scale=1.0), ("nlvr2",)),
    "classifier_scale=2.0, .* 1 with METER": (_fusion(num_external_layers=3), ("vqa",)),
    "not a CLIP ViT": (_vision(name="ViT-B-16-SigLIP", num_layers=4, patch_size_px=0, width=0, num_heads=0), ()),
    "has GELU": (_vision(activation="gelu"), ()),
    "vision.num_heads=4": (_vision(num_heads=4), ()),
    "model_type=bert": (_bert, ()),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_model_that_the_published_code_cannot_hold_is_refused_with_the_reason(reason, tmp_path):
    change, heads = UNFIT[reason]
    config = change(published_config())
    if "SigLIP" in config.vision.name:
        config = dataclasses.replace(config, image_size_px=32)
    with torch.device("meta"):
        model = BridgeTower(config, heads)
    with pytest.raises(CheckpointError, match=f"The published code cannot hold this model: .*{reason}"):
        to_reference(model, tmp_path / "model.ckpt")
    assert names_in(tmp_path) == []


def test_another_epsilon_is_written_with_a_warning_and_unchanged_weights(tmp_path, caplog):
    model = filled(BridgeTower(_fusion(layer_norm_eps=1e-5)(published_config()), ("mlm",)))
    to_reference(model, tmp_path / "model.ckpt")
    assert "an epsilon of 1e-12 in the cross-modal layers and the MLM head, this model has 1e-05" in caplog.text
    loaded = from_reference(tmp_path / "model.ckpt")
    assert loaded.config.fusion.layer_norm_eps == 1e-12
    assert_same(loaded, filled(BridgeTower(published_config(), ("mlm",))))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    to_reference(published_model(), path)
    before = path.read_bytes()

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left"):
        to_reference(published_model(), path)
    assert path.read_bytes() == before and names_in(tmp_path) == ["model.ckpt"]


def test_a_parameter_that_is_a_view_into_a_buffer_is_written_without_the_buffer(tmp_path):
    # DeepSpeed keeps parameters so.
    model = published_model()
    buffer = torch.cat([value.detach().flatten() for value in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    to_reference(model, tmp_path / "model.ckpt")
    size = sum(value.nbytes for value in build_reference_tensors(model).values())
    assert Path(tmp_path / "model.ckpt").stat().st_size < 1.2 * size
    assert_same(from_reference(tmp_path / "model.ckpt"), model)


def test_the_towers_of_the_paper_are_found_by_their_sizes():
    assert find_clip_config(patch_size_px=16, width=768, num_layers=12).name == "ViT-B-16-quickgelu"
    assert find_clip_config(patch_size_px=14, width=1024, num_layers=24).name == "ViT-L-14-quickgelu"
    assert find_clip_config(patch_size_px=16, width=768, num_layers=11).num_layers == 11
    assert find_clip_config(patch_size_px=16, width=768, num_layers=7).name == CUSTOM
    sizes: dict[str, Any] = {"vocabulary_size": 50265, "num_positions": 514, "max_tokens": 50, "dropout": 0.1}
    assert find_roberta_config(width=768, num_layers=12, num_heads=12, **sizes).name == "roberta-base"
    assert find_roberta_config(width=1024, num_layers=24, num_heads=16, **sizes).name == "roberta-large"
    assert find_roberta_config(width=768, num_layers=6, num_heads=12, **sizes).name == CUSTOM
