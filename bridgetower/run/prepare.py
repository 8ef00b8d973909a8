"""What every entry script that trains puts together from its settings in the same way: tokenizer and engine files."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bridgetower.config.data import ReadingConfig
from bridgetower.config.deepspeed import is_bf16, read_named_memory_config
from bridgetower.config.model import CUSTOM, ModelConfig
from bridgetower.config.run import EngineConfig
from bridgetower.data.text import Tokenizer
from bridgetower.engine.launch import computes_bf16
from bridgetower.errors import ConfigError
from bridgetower.model.text_tower import padding_id


def find_memory_config(engine: EngineConfig, folder: Path, device: torch.device) -> dict[str, object]:
    """The file that ``engine.deepspeed`` names, read and checked.

    Args:
        folder: ``ds_configs/``.
    """
    name = engine.deepspeed
    if name == "auto":
        name = "zero2_bf16" if computes_bf16(device) else "zero2_fp32"
    return read_named_memory_config(name, folder)


def precision_of(memory: dict[str, object]) -> str:
    """What weights are held in for computing: bf16 or fp32."""
    return "bf16" if is_bf16(memory) else "fp32"


def build_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer, checked against the model.

    Args:
        model: complete.

    Raises:
        ConfigError: another vocabulary size or another padding id than the text tower's.
    """
    tokenizer = Tokenizer(model.text.tokenizer)
    if tokenizer.vocabulary_size != model.text.vocabulary_size:
        raise ConfigError(
            f"model.text.tokenizer={tokenizer.name} has {tokenizer.vocabulary_size} ids, but "
            f"model.text.vocabulary_size={model.text.vocabulary_size}. "
            + (
                f"Use --model.text.vocabulary_size={tokenizer.vocabulary_size}."
                if model.text.name == CUSTOM
                else "Give the folder of that text tower's tokenizer."
            )
        )
    pad_id = padding_id(model.text)
    if tokenizer.pad_id != pad_id:
        raise ConfigError(
            f"model.text.tokenizer={tokenizer.name} pads with id {tokenizer.pad_id}, but model.text.name="
            f"{model.text.name} with {pad_id}, and counts positions from it if it is a RoBERTa. Use the "
            "tokenizer of that text tower; for your own, order the special tokens <s>, <pad>, </s>, <unk>."
        )
    return tokenizer


def data_cure(data: ReadingConfig, ranks: int) -> str:
    """What helps where steps wait for data.

    Args:
        ranks: of this machine.
    """
    cores = len(os.sched_getaffinity(0)) // ranks
    if data.workers < cores - 1:
        return (
            f"Raise --data.workers={data.workers} to {cores - 1}: each of the {ranks} rank(s) here has {cores} cores."
        )
    return (
        f"All {cores} core(s) of each rank are in use: build the shards with a short side a little above "
        "model.image_size_px (data_prep/build_shards.py --short_side_px), or take machines with more cores for a GPU."
    )
