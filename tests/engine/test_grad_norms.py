"""Norms of the gradient's parts, for every ZeRO stage and precision that keeps the gradient in its own way."""

from __future__ import annotations

import json

import pytest

from tests.integration.runs import train

NAMES = ("", "/vision", "/text", "/fusion", "/heads")


def write_memory_file(tmp_path, stage: int, *, bf16: bool):
    path = tmp_path / "memory.json"
    types = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
    path.write_text(json.dumps({**types, "zero_optimization": {"stage": stage}}))
    return path


def train_and_read_norms(tmp_path, shards, stage: int, *, bf16: bool) -> list[dict[str, float]]:
    """Train two ranks with two micro-steps per step. Returns: the norms of each step."""
    words = [
        f"--engine.deepspeed={write_memory_file(tmp_path, stage, bf16=bf16)}",
        "--data.micro_batch_size=16",
        "--data.negative_group_size=16",
    ]
    train(tmp_path, shards, f"stage{stage}", 3, *words, ranks=2)
    lines = [json.loads(line) for line in (tmp_path / f"stage{stage}/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    return [{name: line.get(f"optim/grad_norm{name}") for name in NAMES} for line in lines]


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, True)], ids=str)
def test_squares_of_the_parts_sum_to_the_square_of_the_whole(tmp_path, emoji_shards, stage, bf16):
    for norms in train_and_read_norms(tmp_path, emoji_shards, stage, bf16=bf16):
        whole = norms.pop("")
        assert all(norm > 0 for norm in norms.values())
        assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(whole, rel=2e-3)


def test_parts_are_the_same_without_zero_and_with_it(tmp_path, emoji_shards):
    whole = train_and_read_norms(tmp_path, emoji_shards, 0, bf16=False)
    partitioned = train_and_read_norms(tmp_path, emoji_shards, 2, bf16=False)
    for one, other in zip(whole, partitioned, strict=True):
        assert one.pop("") is None and other.pop("") > 0  # without ZeRO, DeepSpeed has no norm of the whole
        assert one == pytest.approx(other, rel=1e-4)
