"""A run's weights are exported in every format and load back unchanged, by the commands that a user gives."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BridgeTowerForImageAndTextRetrieval, BridgeTowerForMaskedLM, BridgeTowerProcessor

import bridgetower
from bridgetower.engine.checkpoint_files import load_file as load_checkpoint_file
from bridgetower.engine.checkpoint_files import load_master_weights, load_weights
from bridgetower.errors import CheckpointError
from tests.conftest import run_script
from tests.integration.runs import last_checkpoint
from tests.small_models import random_texts

WIDTH = 128  # of towers and fusion; the other formats need heads of 64 channels


@pytest.fixture(scope="module")
def run(emoji_shards, tmp_path_factory) -> Path:
    """Train a run of two ranks in bfloat16 with every objective."""
    root = tmp_path_factory.mktemp("runs")
    sizes = {"width": WIDTH, "num_layers": 2, "num_heads": 2}
    arguments = [
        "tiny",
        f"--run_root={root}",
        "--name=run",
        f"--data.train_shards={emoji_shards / 'train'}",
        "--data.eval_shards=",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=4",
        "--data.negative_group_size=4",
        "--engine.deepspeed=zero2_bf16",
        "--optim.total_steps=3",
        "--model.vision.patch_size_px=24",
        "--model.text.max_tokens=40",
        *[f"--model.{part}.{name}={value}" for part in ("vision", "text", "fusion") for name, value in sizes.items()],
    ]
    run_script("pretrain/train.py", *arguments, ranks=2)
    return root / "run"


@pytest.fixture(scope="module")
def model(run) -> bridgetower.BridgeTower:
    return bridgetower.load_model(run)


def test_loading_a_run_prints_nothing_and_imports_neither_deepspeed_nor_open_clip(run):
    program = f"import bridgetower, sys; bridgetower.load_model({str(run)!r}); print(*sys.modules)"
    loading = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = loading.stdout.split()
    assert loading.stderr == "" and loading.stdout.count("\n") == 1 and "torch" in modules
    assert not {"deepspeed", "open_clip", "timm", "wandb", "matplotlib"} & set(modules)


def export(model, form, out, *flags) -> Path:
    run_script("pretrain/export.py", str(model), f"--format={form}", f"--out={out}", *flags)
    return out


def assert_same(one, other):
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_weights_of_a_bfloat16_run_are_the_float32_ones_of_its_optimizer(run, model):
    checkpoint = last_checkpoint(run.parent, "run")
    computed, masters = load_weights(checkpoint), load_master_weights(checkpoint)
    assert masters.keys() == computed.keys() == {f"model.{name}" for name in model.state_dict()}
    for name, value in masters.items():
        # The module computes with the rounded master weights.
        assert value.dtype == torch.float32 and torch.equal(value.bfloat16(), computed[name]), name
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], value)
    assert any(not torch.equal(value, computed[name].float()) for name, value in masters.items())


def test_missing_optimizer_file_is_an_error(run, tmp_path):
    copy = tmp_path / "step0000003"
    shutil.copytree(last_checkpoint(run.parent, "run"), copy)
    next(copy.glob("*zero_pp_rank_1*")).unlink()
    assert load_checkpoint_file(copy / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"optimizer files of .* hold .* a file is missing"):
        load_master_weights(copy)


def test_a_run_and_its_checkpoint_are_the_same_model_in_evaluation_mode(run, model):
    assert not model.training and list(model.heads) == ["mlm", "itm", "itc"]
    assert_same(bridgetower.load_model(last_checkpoint(run.parent, "run")), model)


def test_safetensors_export_comes_back_bit_for_bit_from_its_file_and_its_folder(run, model, tmp_path):
    folder = export(run, "safetensors", tmp_path / "out")
    for path in (folder, folder / "model.safetensors"):
        loaded = bridgetower.load_model(path)
        assert loaded.config == model.config and list(loaded.heads) == list(model.heads)
        assert_same(loaded, model)


def test_huggingface_export_opens_unchanged_with_either_class_and_comes_back_bit_for_bit(run, model, tmp_path):
    folder = export(run, "huggingface", tmp_path / "out", "--drop_heads=itc")
    loaded = bridgetower.load_model(folder)
    weights = model.state_dict()
    assert list(loaded.heads) == ["mlm", "itm"]
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    processor = BridgeTowerProcessor.from_pretrained(folder)
    assert processor.tokenizer.mask_token_id == 4 and len(processor.tokenizer) == 1000
    (ids, mask), pixels = random_texts(3, 9), torch.randn(3, 3, 72, 72)
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask.long()}
    output = loaded(pixels, ids, mask)
    for their_class, logits in (
        (BridgeTowerForMaskedLM, loaded.mlm_logits(output)[mask]),
        (BridgeTowerForImageAndTextRetrieval, loaded.itm_logits(output)),
    ):
        theirs, report = their_class.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        with torch.no_grad():
            expected = theirs.eval()(**inputs).logits
        expected = expected[mask] if their_class is BridgeTowerForMaskedLM else expected
        torch.testing.assert_close(expected, logits, rtol=0, atol=1e-5)


def test_reference_export_comes_back_bit_for_bit(run, model, tmp_path):
    folder = export(run, "reference", tmp_path / "out")
    loaded = bridgetower.load_model(folder / "model.ckpt")
    assert list(loaded.heads) == list(model.heads)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_model_is_loaded_for_another_image_size(run, model, tmp_path):
    loaded = bridgetower.load_model(run, image_size_px=120)
    assert loaded.config.image_size_px == 120
    (ids, mask), pixels = random_texts(2, 9), torch.randn(2, 3, 120, 120)
    assert loaded(pixels, ids, mask).image_states.shape == (2, 1 + 25, WIDTH)
    table, resized = (m.vision_tower.vit.positional_embedding for m in (model, loaded))
    assert torch.equal(resized[0], table[0]) and len(resized) == 26
    folder = export(run, "safetensors", tmp_path / "out", "--image_size_px=120")
    assert_same(bridgetower.load_model(folder), loaded)


def test_description_of_a_run_names_its_modules(run):
    output = run_script("pretrain/describe.py", str(run), "--tensors=true").stdout
    for text in (
        "heads.itc",
        "cross_modal.text_bridges",
        "vision_tower.vit.class_embedding",
        "GFLOP",
        "MLM + ITM + ITC",
    ):
        assert text in output


def copy_changed(folder, copy, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    metadata = {"bridgetower": json.dumps(change(weights) or {})}
    copy.mkdir()
    save_file(weights, copy / "model.safetensors", metadata=metadata)
    return copy


def test_error_of_what_cannot_be_loaded_lists_what_can(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for path, message in (
        ("empty", "There is no model in the folder .*empty. `load_model` opens:"),
        ("nowhere", "There is no file or folder .*nowhere. `load_model` opens:"),
        ("cut.safetensors", "not a complete safetensors file"),
        ("foreign.safetensors", "was not exported by this program"),
    ):
        with pytest.raises(CheckpointError, match=message):
            bridgetower.load_model(tmp_path / path)


def test_export_that_lacks_a_tensor_lists_it(run, tmp_path):
    folder = export(run, "safetensors", tmp_path / "out")
    description = {"format_version": 1, "config": json.loads((run / "run.json").read_text())["config"]["model"]}

    def lose(weights):
        del weights["heads.mlm.bias"]
        weights["extra"] = torch.zeros(1)
        return {**description, "heads": ["mlm", "itm", "itc"]}

    with pytest.raises(CheckpointError, match=r"(?s)1 missing: heads\.mlm\.bias.*1 not expected: extra"):
        bridgetower.load_model(copy_changed(folder, tmp_path / "lost", lose))

    with pytest.raises(CheckpointError, match="format version 99"):
        bridgetower.load_model(copy_changed(folder, tmp_path / "new", lambda weights: {"format_version": 99}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--format=onnx", "--out=OUT"], "Unknown format onnx. Known: safetensors, huggingface, reference"),
        (["RUN", "--format=safetensors"], "--format and --out are both needed"),
        (["RUN", "--format=safetensors", "--out=RUN"], "is not an empty folder"),
        (["RUN", "--fromat=safetensors", "--out=OUT"], "Unknown flag --fromat. Did you mean --format?"),
        (["RUN", "--format=huggingface", "--out=OUT"], "no class for the head(s) itc"),
        (["RUN", "--format=huggingface", "--out=OUT", "--drop_heads=vqa"], "Unknown head vqa"),
        (["RUN", "--format=reference", "--out=OUT", "--image_size_px=100"], "is not a multiple of"),
        (["/nowhere/at/all", "--format=reference", "--out=OUT"], "There is no file or folder /nowhere/at/all"),
    ],
)
def test_wrong_export_exits_2_with_a_suggestion_and_writes_nothing(run, tmp_path, arguments, message):
    out = tmp_path / "out"
    words = [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in arguments]
    assert message in run_script("pretrain/export.py", *words, code=2).stderr
    assert not out.exists()


def test_temperature_of_the_loaded_model_is_the_learned_one(model):
    learned = model.itc_head.temperature.item()
    assert math.isfinite(learned) and learned != pytest.approx(0.07, abs=1e-9)
