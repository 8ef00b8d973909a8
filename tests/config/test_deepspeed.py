"""The file that says how memory is split: everything that DeepSpeed would ignore silently is refused."""

from __future__ import annotations

import json
import re

import pytest

from bridgetower.config.deepspeed import MEMORY_KEYS, is_bf16, merge_deepspeed_config, read_memory_config
from bridgetower.config.optim import OptimConfig
from bridgetower.errors import ConfigError
from tests.conftest import REPO

SHIPPED = sorted((REPO / "ds_configs").glob("*.json"))


def read(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_memory_config(path)


def refused(tmp_path, content, match):
    with pytest.raises(ConfigError, match=match) as error:
        read(tmp_path, content)
    assert str(tmp_path / "mine.json") in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_is_accepted_and_returned_unchanged(path):
    assert read_memory_config(path) == json.loads(path.read_text())


def test_shipped_files_have_the_stage_and_precision_of_their_names():
    assert [path.stem for path in SHIPPED] == ["zero2_bf16", "zero2_fp32"]
    bf16, fp32 = map(read_memory_config, SHIPPED)
    assert bf16["zero_optimization"]["stage"] == fp32["zero_optimization"]["stage"] == 2
    assert is_bf16(bf16) and not is_bf16(fp32)
    # Without this key DeepSpeed 0.19.8 accumulates the gradients of micro-steps in bfloat16.
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"}


def test_unknown_top_level_key_is_refused_which_deepspeed_would_ignore(tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 2}, "zebra": 1}, "Unknown key zebra")


@pytest.mark.parametrize(
    ("content", "meant"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimization"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_comm"),
        # DeepSpeed 0.19.8 reads data_types with .get: with this typo it would accumulate in bfloat16.
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enable": True}}, "bf16.enabled"),
    ],
)
def test_misspelt_key_is_answered_with_the_nearest_one(tmp_path, content, meant):
    refused(tmp_path, content, rf"Did you mean {re.escape(meant)}\?")


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("train_batch_size", "--data.global_batch_size"),
        ("train_micro_batch_size_per_gpu", "--data.micro_batch_size"),
        ("gradient_accumulation_steps", "--data.global_batch_size and data.micro_batch_size"),
        ("gradient_clipping", "--optim.max_grad_norm"),
        ("optimizer", "--optim"),
        ("scheduler", "--optim"),
        ("wandb", "--tracker.wandb"),
        ("steps_per_print", "--tracker.every_steps"),
    ],
)
def test_key_that_the_run_decides_is_refused_with_the_setting_to_use(tmp_path, key, setting):
    refused(tmp_path, {"zero_optimization": {"stage": 2}, key: 1}, f"sets {key}, which the run decides.*{setting}")


def test_fp16_is_refused_with_what_to_use_instead(tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "Use bf16")


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, "stage=3 must be 0 or 1 or 2. Stage 3 also splits the weights"),
        ({"stage": -1}, "stage=-1 must be 0 or 1 or 2"),
        ({"stage": "2"}, 'stage="2" must be 0 or 1 or 2'),
        ({"stage": True}, "stage=true must be 0 or 1 or 2"),
        ({}, 'Add "zero_optimization": {"stage": 2}'),
        ({"stage": 2, "reduce_bucket_size": -5}, "reduce_bucket_size=-5 must be an integer above 0"),
        ({"stage": 2, "reduce_bucket_size": 5e7}, "reduce_bucket_size=50000000.0 must be an integer above 0"),
        ({"stage": 2, "overlap_comm": "true"}, 'overlap_comm="true" must be true or false'),
        # These change the layout of the optimiser's files, which then cannot be read at another number of ranks.
        ({"stage": 2, "round_robin_gradients": True}, "Unknown key zero_optimization.round_robin_gradients"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "Unknown key zero_optimization.offload_optimizer"),
    ],
)
def test_value_that_zero_cannot_have_is_refused(tmp_path, zero, message):
    refused(tmp_path, {"zero_optimization": zero}, re.escape(message))


@pytest.mark.parametrize("content", [{"zero_optimization": 2}, {"zero_optimization": {"stage": 2}, "bf16": True}])
def test_value_instead_of_a_section_is_refused(tmp_path, content):
    refused(tmp_path, content, "must be an object")


def test_the_text_false_is_not_read_as_true(tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "false"}}, "must be true or false")


def test_file_without_zero_is_refused(tmp_path):
    refused(tmp_path, {}, "does not say how memory is split")


def test_bf16_without_master_weights_is_refused(tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "Use stage 1 or 2")


@pytest.mark.parametrize(
    "content",
    [
        '{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 1}}',
        '{"zero_optimization": {"stage": 2, "stage": 1}}',
    ],
)
def test_key_that_occurs_twice_is_refused(tmp_path, content):
    refused(tmp_path, content, r"the key '(stage|zero_optimization)' occurs twice")


def test_text_that_is_not_json_is_refused_with_its_line(tmp_path):
    refused(tmp_path, '{"bf16": }', r"is not JSON \(.*line 1")
    refused(tmp_path, "[2]", "must hold one JSON object, not list")


def test_missing_file_is_answered_with_the_existing_ones(tmp_path):
    (tmp_path / "mine.json").touch()
    with pytest.raises(ConfigError, match=r"there is no .*yours\.json.* offers: mine\."):
        read_memory_config(tmp_path / "yours.json")


def test_folder_instead_of_the_file_is_an_error_for_people(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_memory_config(tmp_path)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_deepspeed_sees_the_batch_sizes_and_the_clip_of_the_run(max_grad_norm):
    from deepspeed.runtime.config import DeepSpeedConfig

    merged = merge_deepspeed_config(
        read_memory_config(SHIPPED[0]), micro_batch_size=16, accumulation_steps=4, max_grad_norm=max_grad_norm
    )
    seen = DeepSpeedConfig(merged)
    assert (seen.train_micro_batch_size_per_gpu, seen.gradient_accumulation_steps) == (16, 4)
    assert seen.train_batch_size == 64  # in one process
    # Without the key DeepSpeed 0.19.8 clips at 1.0.
    assert seen.gradient_clipping == max_grad_norm
    assert seen.zero_config.stage == 2 and seen.bfloat16_config.enabled and seen.grad_accum_dtype == "fp32"


def test_published_runs_do_not_clip():
    assert OptimConfig(base_lr=1e-5, total_steps=1).max_grad_norm == 0.0


def test_every_key_that_is_accepted_exists_in_this_deepspeed():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "comms_logger": CommsLoggerConfig}
    for section, model in models.items():
        assert set(MEMORY_KEYS[section]) <= set(model.model_fields)
    assert set(MEMORY_KEYS["data_types"]) == {constants.GRAD_ACCUM_DTYPE}
    flat = {constants.COMMUNICATION_DATA_TYPE, constants.WALL_CLOCK_BREAKDOWN, config.MEMORY_BREAKDOWN}
    assert set(MEMORY_KEYS) == {*models, constants.DATA_TYPES, *flat}
