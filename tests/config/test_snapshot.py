"""run.json: it repeats a run, and a resume is compared with it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bridgetower.config import snapshot
from bridgetower.config.cli import config_from_cli
from bridgetower.config.finetune import FinetuneConfig
from bridgetower.config.overrides import apply_overrides, from_dict, to_dict, walk_fields
from bridgetower.config.run import RunConfig
from bridgetower.config.snapshot import (
    Identity,
    check_resume,
    check_same_run,
    read_config,
    read_model_config,
    read_run_config,
    read_run_file,
    write_run_file,
)
from bridgetower.errors import CheckpointError, ConfigError
from finetune.presets import PRESETS as FINETUNE_PRESETS
from pretrain.presets import PRESETS, tiny

OLD_RUN = Path(__file__).parent / "data" / "run_3cc34ec.json"
"""Written by `pretrain/train.py tiny` at commit 3cc34ec, with seven settings of compute that were removed later.

Unchanged, but for the folder that paths begin with."""

IDENTITY = Identity(data_digests={"shards/a": "1234"}, optimizer="torch", precision="fp32", contrast_pairs=64)


def write(folder, config, identity=IDENTITY):
    write_run_file(folder, config, identity, world_size=2, device="cpu")
    return folder / "run.json"


@pytest.mark.parametrize("name", PRESETS)
def test_run_json_gives_back_the_whole_configuration(tmp_path, name):
    config = apply_overrides(PRESETS[name](), {"seed": "3", "optim.base_lr": "3.3e-5"})
    assert read_run_config(write(tmp_path, config)) == config


def test_run_json_serves_as_a_preset_and_takes_overrides(tmp_path):
    path = write(tmp_path, apply_overrides(tiny(), {"seed": "3"}))
    repeated = config_from_cli(PRESETS, str(path), (), {"name": "again"}, "usage")
    assert repeated == apply_overrides(tiny(), {"seed": "3", "name": "again"})


def test_run_json_names_what_the_numbers_came_from(tmp_path):
    content = read_run_file(write(tmp_path, tiny()))
    assert content["data_digests"] == {"shards/a": "1234"}
    assert (content["optimizer"], content["precision"], content["world_size"]) == ("torch", "fp32", 2)
    assert set(content["versions"]) >= {"torch", "deepspeed", "transformers", "open_clip_torch", "bridgetower"}
    assert "not installed" not in content["versions"].values()
    assert re.fullmatch(r"([0-9a-f]{40}\+?)?", content["commit"])


def test_missing_run_json_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"There is no {tmp_path / 'run.json'}")):
        read_run_file(tmp_path / "run.json")


def test_path_that_is_not_a_run_folder_is_an_error_for_people(tmp_path):
    (tmp_path / "notes").write_text("no run")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run_file(tmp_path / "notes" / "run.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"config": ', "is not JSON"),
        ("[1, 2]", "is not the run.json of a run"),
        ('{"settings": {}}', "it has no section 'config'"),
    ],
)
def test_damaged_run_json_is_an_error_that_says_how(tmp_path, content, said):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_run_file(path)


@pytest.mark.parametrize("name", ["precision", "optimizer", "data_digests", "world_size", "device", "commit"])
def test_run_json_without_what_is_read_later_is_refused_at_once(tmp_path, name):
    path = write(tmp_path, tiny())
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"it has no section '{name}'"):
        read_run_file(path)


def test_edited_run_json_is_checked_as_strictly_as_a_command_line(tmp_path):
    path = write(tmp_path, tiny())
    path.write_text(path.read_text().replace('"base_lr"', '"base_lrr"'))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: Unknown setting optim.base_lrr. Did you mean optim.b")):
        read_run_config(path)


def test_same_settings_and_data_are_the_same_run(tmp_path):
    write(tmp_path, tiny())
    check_same_run(tmp_path, tiny(), IDENTITY)


# Settings that may change on resume: they do not change a number of the run, or say where it is, how often it does
# something, or on how much hardware it runs.
FREE = {
    *("name", "run_root", "resume"),
    # A folder may have moved; the digest of its content is compared instead.
    *("data.train_shards", "data.eval_shards"),
    *("data.micro_batch_size", "data.workers", "data.prefetch_batches"),
    # After a failure a run may continue without the pairs that cannot be read.
    *("data.on_bad_sample", "data.max_bad_fraction"),
    *("data.cache_dir", "data.cache_gb", "data.record_pairs"),
    # Identity.optimizer is compared instead.
    "optim.implementation",
    *("engine.deepspeed", "engine.threads_per_rank"),
    # How a step is computed changes no loss and no gradient.
    *(f"compute.{field}" for field in vars(tiny().compute)),
    *(f"evaluation.{field}" for field in vars(tiny().evaluation)),
    *(f"checkpoint.{field}" for field in vars(tiny().checkpoint)),
    *(f"tracker.{field}" for field in vars(tiny().tracker)),
}


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return [*value, "other"] if isinstance(value, list) else f"{value}other"


@pytest.mark.parametrize("name", [name for name, *_ in walk_fields(tiny())])
def test_each_setting_that_decides_a_number_stops_a_resume_and_no_other_does(tmp_path, name):
    path = write(tmp_path, tiny())
    content = json.loads(path.read_text())
    section = content["config"]
    *sections, leaf = name.split(".")
    for part in sections:
        section = section[part]
    # The saved run is edited instead of the new settings, so that no combination of settings has to be valid.
    section[leaf] = another(section[leaf])
    path.write_text(json.dumps(content))
    if name in FREE:
        check_same_run(tmp_path, tiny(), IDENTITY)
    else:
        with pytest.raises(CheckpointError, match=rf"\n  {re.escape(name)}: .* -> "):
            check_same_run(tmp_path, tiny(), IDENTITY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "fused"}, "optimizer: torch -> fused"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"contrast_pairs": 32}, "(data.micro_batch_size x ranks): 64 -> 32"),
        ({"data_digests": {"shards/a": "5678"}}, "training data: shards/a -> shards/a"),
        ({"data_digests": {"shards/a": "1234", "shards/b": "5678"}}, "training data: shards/a -> shards/a, shards/b"),
    ],
)
def test_other_optimiser_precision_or_data_stops_a_resume(tmp_path, change, said):
    write(tmp_path, tiny())
    with pytest.raises(CheckpointError, match=re.escape(said)):
        check_same_run(tmp_path, tiny(), dataclasses.replace(IDENTITY, **change))


def test_moved_shards_with_the_same_content_are_the_same_data(tmp_path):
    write(tmp_path, tiny())
    check_same_run(tmp_path, tiny(), dataclasses.replace(IDENTITY, data_digests={"elsewhere": "1234"}))


def test_all_differences_are_listed_at_once_with_what_to_do(tmp_path):
    write(tmp_path, tiny())
    other = apply_overrides(tiny(), {"seed": "1", "optim.base_lr": "2e-3", "model.vision.num_layers": "5"})
    with pytest.raises(CheckpointError) as error:
        check_same_run(tmp_path, other, IDENTITY)
    for line in ("seed: 0 -> 1", "optim.base_lr: 0.001 -> 0.002", "model.vision.num_layers: 4 -> 5", "another --name"):
        assert line in str(error.value)


def test_setting_that_an_older_run_did_not_have_takes_its_default(tmp_path):
    content = to_dict(tiny())
    del content["optim"]["decay_like_reference"]
    assert from_dict(RunConfig, content) == tiny()


def with_setting(path, name, value):
    """Add a setting to the configuration of a run.json."""
    content = json.loads(path.read_text())
    section, _, field = name.partition(".")
    content["config"][section][field] = value
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def removed(monkeypatch):
    """The name of a setting that older runs had, with the default true."""
    monkeypatch.setitem(snapshot._REMOVED_SETTINGS, "compute.removed_switch", True)
    return "compute.removed_switch"


def test_run_json_of_an_older_version_opens_without_a_word(caplog):
    saved = json.loads(OLD_RUN.read_text())["config"]
    config = read_config(OLD_RUN, RunConfig)
    kept = to_dict(config)
    kept["compute"] |= {name: value for name, value in saved["compute"].items() if name not in kept["compute"]}
    assert kept == saved
    assert read_model_config(OLD_RUN) == (config.model, ("mlm", "itm", "itc"))
    assert not caplog.records


def test_run_json_of_an_older_version_serves_as_a_preset():
    repeated = config_from_cli(PRESETS, str(OLD_RUN), (), {"name": "again"}, "usage")
    assert repeated == dataclasses.replace(read_run_config(OLD_RUN), name="again")


def test_run_of_an_older_version_resumes_with_the_same_settings_only(tmp_path):
    (tmp_path / "checkpoints" / "step0000005").mkdir(parents=True)
    (tmp_path / "run.json").write_bytes(OLD_RUN.read_bytes())
    content = read_run_file(OLD_RUN)
    identity = Identity(**{field.name: content[field.name] for field in dataclasses.fields(Identity)})
    config = read_run_config(OLD_RUN)
    assert check_resume(tmp_path, config, identity) == ""
    with pytest.raises(CheckpointError, match="seed: 0 -> 1"):
        check_resume(tmp_path, dataclasses.replace(config, seed=1), identity)


def test_removed_setting_at_its_default_is_dropped_without_a_word(tmp_path, removed, caplog):
    path = with_setting(write(tmp_path, tiny()), removed, True)
    assert read_run_config(path) == tiny()
    assert not caplog.records


def test_removed_setting_that_was_switched_off_is_dropped_with_one_line_that_names_it(tmp_path, removed, caplog):
    path = with_setting(write(tmp_path, tiny()), removed, False)
    assert read_run_config(path) == tiny()
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line and "compute.removed_switch=false" in line
    assert "no longer exist" in line and "losses and gradients are the same" in line


def test_removed_setting_is_dropped_from_a_fine_tuning_run_too(tmp_path, removed):
    config = next(iter(FINETUNE_PRESETS.values()))()
    path = with_setting(write(tmp_path, config), removed, True)
    assert read_config(path, FinetuneConfig) == config


def test_removed_setting_does_not_stop_a_resume(tmp_path, removed):
    with_setting(write(tmp_path, tiny()), removed, False)
    check_same_run(tmp_path, tiny(), IDENTITY)


def test_removed_setting_is_unknown_on_a_command_line(tmp_path, removed):
    path = with_setting(write(tmp_path, tiny()), removed, True)
    with pytest.raises(ConfigError, match=r"Unknown setting --compute\.removed_switch"):
        config_from_cli(PRESETS, str(path), (), {removed: "true"}, "usage")


def test_setting_that_never_existed_is_an_error_in_a_run_json(tmp_path):
    path = with_setting(write(tmp_path, tiny()), "compute.never_was", True)
    with pytest.raises(ConfigError, match=r"Unknown setting compute\.never_was"):
        read_run_config(path)
