"""What a run of either kind prepares from its settings: DeepSpeed file, tokenizer and order of the pairs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from bridgetower.config.data import ReadingConfig
from bridgetower.config.deepspeed import is_bf16, read_named_memory_config
from bridgetower.config.model import CUSTOM, ModelConfig
from bridgetower.config.run import EngineConfig
from bridgetower.config.snapshot import Settings
from bridgetower.data.corpora import Corpora
from bridgetower.data.order import Order
from bridgetower.data.text import Tokenizer
from bridgetower.engine.launch import computes_bf16
from bridgetower.errors import ConfigError
from bridgetower.model.sizes import padding_id


def find_memory_config(engine: EngineConfig, folder: Path, device: torch.device) -> dict[str, object]:
    """Read and check the file that ``engine.deepspeed`` names.

    Args:
        folder: ``ds_configs/``.
    """
    name = engine.deepspeed
    if name == "auto":
        name = "zero2_bf16" if computes_bf16(device) else "zero2_fp32"
    return read_named_memory_config(name, folder)


def precision_of(memory: Mapping[str, object]) -> str:
    """Return the precision of the weights in forward and backward: bf16 or fp32."""
    return "bf16" if is_bf16(memory) else "fp32"


def build_tokenizer(model: ModelConfig) -> Tokenizer:
    """Load the tokenizer, and check it against the text tower.

    Args:
        model: complete.

    Raises:
        ConfigError: the tokenizer has another vocabulary size or padding id than the text tower.
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
            f"{model.text.name} pads with id {pad_id} (a RoBERTa also counts positions from it). Use that text tower's "
            "tokenizer; if you build one, order its special tokens <s>, <pad>, </s>, <unk>."
        )
    return tokenizer


def build_order(config: Settings, corpora: Corpora) -> Order:
    """Build the order of the training pairs, which depends only on the seed, the corpora and their weights."""
    return Order(
        corpora.pairs_per_shard,
        corpora.corpus_of_shard,
        seed=config.seed,
        shards_per_window=config.data.shards_per_window,
        corpus_weights=config.data.corpus_weights,
    )


def suggest_faster_data(data: ReadingConfig, local_ranks: int) -> str:
    """Suggest what to change when steps wait for data.

    Args:
        local_ranks: ranks on this node.
    """
    cores = len(os.sched_getaffinity(0)) // local_ranks
    if data.workers < cores - 1:
        return (
            f"Raise --data.workers={data.workers} to {cores - 1}: each of the {local_ranks} rank(s) on this node has "
            f"{cores} cores."
        )
    return (
        f"All {cores} core(s) per rank are in use: build the shards with a short side a little above "
        "model.image_size_px (data_prep/build_shards.py --short_side_px), or use nodes with more cores per GPU."
    )
