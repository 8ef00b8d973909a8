"""From a configuration to the objects of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bridgetower import draws
from bridgetower.config.deepspeed import is_bf16, read_memory_config
from bridgetower.config.schema import CUSTOM, RunConfig
from bridgetower.data.corpora import Corpora
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.index import ShardReader
from bridgetower.data.loader import PretrainStream
from bridgetower.data.manifest import load_manifest
from bridgetower.data.order import Cut, Order
from bridgetower.data.text import Tokenizer
from bridgetower.engine.checkpoint import load_weights
from bridgetower.engine.evaluate import SplitScores, evaluate_split
from bridgetower.engine.launch import computes_bf16
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.model.bridgetower import BridgeTower, complete_model_config
from bridgetower.model.pretrained import check_vision_weights, load_tower_weights
from bridgetower.model.text_tower import padding_id
from bridgetower.task import PretrainTask

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def complete(config: RunConfig) -> RunConfig:
    """The same with every size that the towers' names stand for, which is what a run records.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    return dataclasses.replace(config, model=complete_model_config(config.model))


def find_memory_config(config: RunConfig, device: torch.device) -> dict[str, object]:
    """The file of ``ds_configs/`` that ``engine.deepspeed`` names, read and checked."""
    name = config.engine.deepspeed
    if name == "auto":
        name = "zero2_bf16" if computes_bf16(device) else "zero2_fp32"
    path = Path(name) if "/" in name or name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    return read_memory_config(path)


def precision_of(memory: dict[str, object]) -> str:
    """What weights are held in for computing: bf16 or fp32."""
    return "bf16" if is_bf16(memory) else "fp32"


def build_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer, checked against the model.

    Raises:
        ConfigError: another vocabulary size or another padding id than the text tower's.
    """
    tokenizer = Tokenizer(config.model.text.tokenizer)
    if tokenizer.vocabulary_size != config.model.text.vocabulary_size:
        raise ConfigError(
            f"model.text.tokenizer={tokenizer.name} has {tokenizer.vocabulary_size} ids, but "
            f"model.text.vocabulary_size={config.model.text.vocabulary_size}. "
            + (
                f"Use --model.text.vocabulary_size={tokenizer.vocabulary_size}."
                if config.model.text.name == CUSTOM
                else "Give the folder of that text tower's tokenizer."
            )
        )
    pad_id = padding_id(config.model.text)
    if tokenizer.pad_id != pad_id:
        raise ConfigError(
            f"model.text.tokenizer={tokenizer.name} pads with id {tokenizer.pad_id}, but model.text.name="
            f"{config.model.text.name} with {pad_id}, and counts positions from it if it is a RoBERTa. Use the "
            "tokenizer of that text tower; for your own, order the special tokens <s>, <pad>, </s>, <unk>."
        )
    return tokenizer


def build_stream(config: RunConfig, corpora: Corpora, cut: Cut, rank: int, tokenizer: Tokenizer) -> PretrainStream:
    """The training pairs of one rank."""
    order = Order(
        corpora.pairs_per_shard,
        corpora.corpus_of_shard,
        seed=config.seed,
        shards_per_window=config.data.shards_per_window,
    )
    return PretrainStream(
        corpora,
        order,
        cut,
        rank=rank,
        seed=config.seed,
        tokenizer=tokenizer,
        image_size_px=config.model.image_size_px,
        max_text_tokens=config.model.text.max_tokens,
        mlm_probability=config.objectives.mlm_probability,
        negative_group_size=config.data.negative_group_size,
    )


def check_held_out(folders: Sequence[str], train: Corpora | None = None) -> None:
    """Stop before anything starts if a held-out folder is not there, is trained on, or two have the same name.

    Raises:
        ConfigError: two folders have the same last name, which would name their scores, or one has pictures that the
            run trains on.
    """
    names = [Path(folder).name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.eval_shards names two folders {name!r}; scores are listed by that name. Rename one."
            )
    trained = image_ids(train) if train is not None and folders else None
    for folder in folders:
        load_manifest(folder)
        if trained is not None:
            shared = int(np.isin(np.unique(image_ids(Corpora([folder]))), trained).sum())
            if shared:
                raise ConfigError(
                    f"{shared:,} pictures of the held-out {folder} are also in data.train_shards (same image_id), so "
                    "its scores would be those of training. Take them out of one, or give other data.eval_shards."
                )


def image_ids(corpora: Corpora) -> npt.NDArray[np.uint64]:
    """The 64-bit image ids of all samples, from the row indexes alone."""
    readers = [ShardReader(path) for path in corpora.shard_paths]
    try:
        return np.concatenate([reader.image_ids() for reader in readers])
    finally:
        for reader in readers:
            reader.close()


def build_splits(config: RunConfig, tokenizer: Tokenizer) -> list[HeldOutSplit]:
    """The held-out splits."""
    return [
        HeldOutSplit(
            folder,
            tokenizer=tokenizer,
            image_size_px=config.model.image_size_px,
            max_text_tokens=config.model.text.max_tokens,
            mlm_probability=config.objectives.mlm_probability,
            max_images=config.evaluation.max_images,
        )
        for folder in config.data.eval_shards
    ]


def build_task(config: RunConfig) -> PretrainTask:
    """Model and objectives with their initial weights, a function of the seed and the towers' weights."""
    check_vision_weights(config.model.vision)
    torch.manual_seed(draws.key(config.seed, "weights") >> 1)
    model = BridgeTower(config.model, config.objectives.heads)
    load_tower_weights(model)
    return PretrainTask(model, config.objectives)


def load_task(config: RunConfig, checkpoint: Path, precision: str) -> PretrainTask:
    """The task of a run with the weights of a checkpoint, every one of them.

    Args:
        precision: of the weights, as run.json has it: bf16 or fp32.

    Raises:
        CheckpointError: the weights are not those of this model.
    """
    task = PretrainTask(BridgeTower(config.model, config.objectives.heads), config.objectives)
    if precision == "bf16":
        task.bfloat16()
    try:
        task.load_state_dict(load_weights(checkpoint), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not hold this model: {error}") from error
    return task


def evaluate_splits(
    task: PretrainTask, splits: Sequence[HeldOutSplit], config: RunConfig, device: torch.device
) -> dict[str, SplitScores]:
    """Scores of all splits, by name; called on all ranks."""
    task.eval()
    return {
        split.name: evaluate_split(task, split, config.evaluation, seed=config.seed, device=device) for split in splits
    }
