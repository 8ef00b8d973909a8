"""The objects of a pretraining run, built from its settings."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bridgetower.config.overrides import apply_overrides
from bridgetower.data.corpora import Corpora
from bridgetower.data.held_out import check_held_out
from bridgetower.data.images import load_image
from bridgetower.engine.launch import computes_bf16
from bridgetower.errors import CheckpointError, ConfigError, DataError
from bridgetower.run.prepare import build_tokenizer, find_memory_config, precision_of, suggest_faster_data
from data_prep.record import ImageFile, Record
from pretrain.assemble import build_task, find_reference_speed, load_task
from pretrain.assemble_data import build_splits
from pretrain.presets import DS_CONFIGS, tiny
from tests.conftest import REPO, run_script
from tests.small_corpora import build_records, file_of

CPU = torch.device("cpu")


def configured(**overrides):
    return apply_overrides(tiny(), {name.replace("__", "."): value for name, value in overrides.items()})


def weights_of(**overrides):
    return build_task(configured(**overrides)).state_dict()


def test_initial_weights_depend_on_the_seed_and_not_on_earlier_random_numbers():
    first = weights_of()
    torch.rand(7)
    again, other = weights_of(), weights_of(seed="1")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_model_with_another_vocabulary_size_than_the_tokenizer_is_refused():
    assert build_tokenizer(configured().model).vocabulary_size == 1000
    with pytest.raises(ConfigError, match=r"roberta has 50265 ids.*Use --model\.text\.vocabulary_size=50265"):
        build_tokenizer(configured(model__text__tokenizer="roberta").model)


def test_two_held_out_folders_with_the_same_name_are_refused():
    with pytest.raises(ConfigError, match="two folders 'test'"):
        check_held_out(configured(data__eval_shards="shards/a/test,shards/b/test").data)


def test_held_out_folder_whose_images_are_trained_on_is_refused(emoji_shards):
    train = Corpora([emoji_shards / "train", emoji_shards / "concept"])
    one, both = str(emoji_shards / "combination"), f"{emoji_shards / 'combination'},{emoji_shards / 'concept'}"
    check_held_out(configured(data__eval_shards=one).data, train)
    with pytest.raises(ConfigError, match=r"131 images of the held-out .*concept are also in data\.train_shards"):
        check_held_out(configured(data__eval_shards=both).data, train)


def test_held_out_folder_with_a_single_image_is_refused_before_training(tmp_path):
    Image.new("RGB", (80, 80), "red").save(tmp_path / "one.png")
    (tmp_path / "captions.csv").write_text("image,caption\none.png,red\n")
    flags = [f"--raw={tmp_path}", f"--captions={tmp_path / 'captions.csv'}", f"--out={tmp_path / 'shards'}"]
    run_script("data_prep/build_shards.py", "folder", *flags)
    with pytest.raises(DataError, match=r"held-out .*shards has a single image.* Give another folder"):
        check_held_out(configured(data__eval_shards=str(tmp_path / "shards")).data)


def test_held_out_images_are_resized_as_exactly_as_training_images(tmp_path):
    y, x = np.mgrid[:600, :800]
    waves = np.stack([np.sin(x / 3), np.cos(y / 4), np.sin((x + y) / 5)], axis=-1)
    raw = file_of(Image.fromarray((127.5 + 120 * waves).astype(np.uint8)), "JPEG", quality=95)
    (tmp_path / "large.jpg").write_bytes(raw)
    image = ImageFile(path=tmp_path / "large.jpg")
    build_records([Record(key="a", image=image, image_id="a", captions=("waves",))], tmp_path / "shards")
    decoded = []
    for exact in (True, False):
        config = configured(data__eval_shards=str(tmp_path / "shards"), data__exact_resize=str(exact))
        (split,) = build_splits(config, build_tokenizer(config.model))
        decoded.append(split.image_batch(0, 1).pixels_N3SS[0])
        assert torch.equal(decoded[-1], load_image(raw, config.model.image_size_px, "x", exact=exact))
    assert not torch.equal(*decoded)


def test_for_slow_data_the_suggestion_is_as_many_workers_as_there_are_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(32))
    assert "Raise --data.workers=3 to 7:" in suggest_faster_data(configured(data__workers="3").data, local_ranks=4)
    assert "--short_side_px" in suggest_faster_data(configured(data__workers="7").data, local_ranks=4)


def test_auto_computes_in_bfloat16_on_a_processor_that_supports_it():
    expected = "bf16" if computes_bf16(CPU) else "fp32"
    assert precision_of(find_memory_config(configured().engine, DS_CONFIGS, CPU)) == expected


def test_deepspeed_file_is_found_by_name_and_by_path(tmp_path):
    shutil.copy(REPO / "ds_configs/zero2_fp32.json", tmp_path / "mine.json")
    by_name = find_memory_config(configured(engine__deepspeed="zero2_fp32").engine, DS_CONFIGS, CPU)
    mine = configured(engine__deepspeed=str(tmp_path / "mine.json"))
    assert find_memory_config(mine.engine, DS_CONFIGS, CPU) == by_name
    assert precision_of(by_name) == "fp32"


def save(task, folder):
    torch.save({"module": task.state_dict()}, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_a_checkpoint_come_back_in_their_precision(tmp_path, precision):
    task = build_task(configured())
    if precision == "bf16":
        task.bfloat16()
    save(task, tmp_path)
    loaded = load_task(configured(seed="1"), tmp_path, precision).state_dict()
    for name, value in task.state_dict().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    save(build_task(configured(objectives__itc="no")), tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)does not hold this model.*heads\.itc"):
        load_task(configured(), tmp_path, "fp32")


def test_reference_speed_is_the_operations_of_a_pair():
    speed = find_reference_speed(configured(), CPU)
    assert 0 < speed.flops_per_pair(10) < speed.flops_per_pair(20) and speed.peak_flops is None
