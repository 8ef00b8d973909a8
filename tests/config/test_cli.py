"""A command line becomes a run, its help, or one line that says what is wrong."""

from __future__ import annotations

import sys

import pytest

from bridgetower.config.cli import (
    config_from_cli,
    describe_settings,
    narrow_overrides,
    parse_bool,
    parse_whole,
    refuse_unknown,
    run_command,
    show_usage_or_stop,
)
from bridgetower.config.overrides import walk_fields
from bridgetower.errors import ConfigError, TrainingError
from pretrain.presets import PRESETS, tiny

USAGE = "Usage: train.py PRESET"


def configure(preset, *unexpected, **overrides):
    return config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)


def test_overrides_change_only_their_settings_of_the_preset():
    config = configure("tiny", **{"optim.base_lr": "2e-3", "seed": "7"})
    assert (config.optim.base_lr, config.seed, config.model) == (2e-3, 7, tiny().model)


def test_misspelt_preset_is_answered_with_the_nearest_one_and_all():
    with pytest.raises(ConfigError, match=r"Unknown preset base_4n\. Did you mean base_4m\? Known: tiny, base_4m"):
        configure("base_4n")


def test_missing_preset_is_answered_with_the_presets_and_their_descriptions():
    with pytest.raises(ConfigError, match=r"(?s)Which preset\?.*large_4m +Pretrain BridgeTower-Large as published"):
        configure("")


def test_word_after_the_preset_is_refused_with_how_settings_are_written():
    with pytest.raises(ConfigError, match=r"Unexpected word\(s\) 'seed=1'.*--section\.field=value"):
        configure("tiny", "seed=1")


@pytest.mark.parametrize("word", ["help", "h"])
def test_help_of_a_preset_prints_each_setting_with_its_value_type_and_meaning(capsys, word):
    with pytest.raises(SystemExit) as end:
        configure("tiny", **{word: "True"})
    assert end.value.code == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name, _, _, _ in walk_fields(tiny()):
        row = next(number for number, line in enumerate(lines) if line.startswith(f"  --{name}="))
        assert lines[row].endswith(")"), f"{name} has no type"
        assert lines[row + 1].startswith("      "), f"{name} has no meaning"
    assert "--optim.base_lr=0.001  (number)" in printed
    assert "--objectives.itc=true  (true|false)" in printed
    assert "--data.eval_shards=shards/emoji/combination,shards/emoji/concept  (text,text,...)" in printed
    assert "--optim.implementation=auto  (auto|fused|torch)" in printed


def test_help_without_a_preset_lists_the_presets(capsys):
    with pytest.raises(SystemExit) as end:
        configure("", help="True")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in PRESETS)


def test_values_that_help_prints_are_accepted_as_overrides():
    overrides = {}
    for line in describe_settings(tiny(), USAGE).splitlines():
        if line.startswith("  --"):
            name, _, value = line[4:].rpartition("  (")[0].partition("=")
            overrides[name] = value
    assert len(overrides) == len(list(walk_fields(tiny())))
    assert configure("large_4m", **overrides) == tiny()


def narrow(*unexpected, **overrides):
    return narrow_overrides(tiny(), ("data.eval_shards", "evaluation."), unexpected, overrides, USAGE)


def test_command_for_some_settings_accepts_these():
    assert narrow(**{"evaluation.max_images": "5"}).evaluation.max_images == 5


def test_command_for_some_settings_refuses_the_others():
    with pytest.raises(
        ConfigError, match=r"Unknown setting --evaluation\.max_image\. Did you mean --evaluation\.max_i"
    ):
        narrow(**{"evaluation.max_image": "5"})
    with pytest.raises(ConfigError, match=r"Unknown setting --optim\.base_lr\."):
        narrow(**{"optim.base_lr": "1"})


def test_command_for_some_settings_shows_only_these(capsys):
    with pytest.raises(SystemExit):
        narrow(help="True")
    printed = capsys.readouterr().out
    assert "--evaluation.max_images" in printed and "--optim" not in printed


def test_command_with_flags_refuses_unknown_flags_and_words():
    refuse_unknown([], {}, ["out"], USAGE)
    with pytest.raises(ConfigError, match=r"Unknown flag --oout\. Did you mean --out\?"):
        refuse_unknown([], {"oout": "x"}, ["out"], USAGE)
    with pytest.raises(ConfigError, match=r"Unexpected word\(s\) 'x'"):
        refuse_unknown(["x"], {}, ["out"], USAGE)


def test_command_without_its_argument_says_which(capsys):
    with pytest.raises(ConfigError, match="Which run"):
        show_usage_or_stop("run", {}, USAGE)
    with pytest.raises(SystemExit):
        show_usage_or_stop("run", {"help": "True"}, USAGE)
    assert capsys.readouterr().out.startswith(USAGE)


def test_flag_that_is_a_whole_number_is_parsed_strictly():
    assert parse_whole("workers", "0", 0) == 0
    with pytest.raises(ConfigError, match=r"--workers=two is not a whole number, e\.g\. --workers=1"):
        parse_whole("workers", "two", 0)
    with pytest.raises(ConfigError, match=r"--workers=1\.5 is not a whole number"):
        parse_whole("workers", "1.5", 0)
    with pytest.raises(ConfigError, match="--samples=0 must be 1 or more"):
        parse_whole("samples", "0", 1)


def test_flag_that_is_true_or_false_is_parsed_strictly():
    assert parse_bool("force", "YES") and not parse_bool("force", "off")
    with pytest.raises(ConfigError, match="--force=maybe is neither true nor false"):
        parse_bool("force", "maybe")


def end_of(command, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code, capsys.readouterr().err


def raising(error, rank=None):
    def command():
        error.rank = rank
        raise error

    return command


def test_error_for_people_is_one_line_with_its_exit_code(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert end_of(raising(ConfigError("no such thing")), capsys) == (2, "error: no such thing\n")
    assert end_of(raising(TrainingError("loss is nan")), capsys) == (1, "error: loss is nan\n")


def test_error_of_all_ranks_is_printed_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert end_of(raising(ConfigError("no such thing")), capsys) == (2, "")


def test_error_of_one_rank_is_printed_by_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert end_of(raising(ConfigError("damaged"), rank=3), capsys) == (2, "[rank 3] error: damaged\n")


def test_error_that_is_not_for_people_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("word", ["-", "--"])
def test_lone_dashes_are_refused_because_fire_would_drop_the_words_after_them(capsys, monkeypatch, word):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", word, "--seed=1"])
    code, printed = end_of(lambda: pytest.fail("it ran"), capsys)
    assert code == 2 and f"A lone {word} would hide" in printed
