"""``pretrain/trace.py`` shows what the model is given, at any step and however many ranks the run has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bridgetower.errors import ConfigError
from pretrain import trace
from tests.conftest import run_script


def lines_of(capsys, shards, *flags: str) -> list[dict[str, Any]]:
    """What the command prints, without the fields that depend on how the run is cut into ranks and micro-steps."""
    words = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    trace.main("tiny", **{"data.train_shards": str(shards / "train"), **words})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [{k: v for k, v in line.items() if k not in ("rank", "micro_step")} for line in lines]


def test_a_step_does_not_depend_on_ranks_micro_batches_workers_or_decoding(emoji_shards, capsys):
    expected = lines_of(capsys, emoji_shards, "--from_step=900", "--steps=2")
    assert [line["position"] for line in expected] == list(range(899 * 64, 901 * 64))
    assert {line["step"] for line in expected} == {900, 901}
    for flags in (
        ("--world_size=2", "--data.micro_batch_size=32"),
        ("--data.micro_batch_size=64", "--workers=1"),
        ("--decode=true",),
    ):
        assert lines_of(capsys, emoji_shards, "--from_step=900", "--steps=2", *flags) == expected


def test_the_ranks_one_after_another_are_the_whole_step(emoji_shards, capsys):
    whole = lines_of(capsys, emoji_shards, "--world_size=2")
    ranks = [lines_of(capsys, emoji_shards, "--world_size=2", f"--rank={rank}") for rank in (0, 1)]
    assert [*ranks[0], *ranks[1]] == whole and len(ranks[1]) == 32


def test_the_command_prints_json_and_nothing_else(emoji_shards):
    result = run_script("pretrain/trace.py", "tiny", f"--data.train_shards={emoji_shards / 'train'}", "--steps=1")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 64
    assert set(lines[0]) == {
        *("step", "position", "epoch", "rank", "micro_step", "shard", "key", "image_id", "caption", "masked"),
        *("itm_label", "negative_key"),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"from_step": "0"}, "--from_step=0 must be 1 or more"),
        ({"steps": "x"}, "--steps=x is not a whole number"),
        ({"rank": "2", "world_size": "2"}, "--rank=2 does not exist: ranks are counted from 0, and --world_size=2"),
        ({"form_step": "3"}, "Unknown setting --form_step"),
        ({"world_size": "3"}, "does not divide into micro-batches"),
    ],
)
def test_wrong_flags_are_refused(flags, message, emoji_shards):
    with pytest.raises(ConfigError, match=message):
        trace.main("tiny", **{"data.train_shards": str(emoji_shards / "train"), **flags})
