"""From a configuration to the data of a run; nothing here trains."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bridgetower.config.schema import CUSTOM, DataConfig, RunConfig
from bridgetower.data.corpora import Corpora, open_cache, open_corpora
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.index import load_index
from bridgetower.data.manifest import load_manifest
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.errors import ConfigError, DataError
from bridgetower.model.bridgetower import complete_model_config
from bridgetower.model.text_tower import padding_id
from bridgetower.storage import place

_READS_AT_ONCE = 16  # of files in an object store, each of which takes a while to answer


def complete(config: RunConfig) -> RunConfig:
    """The same with every size that the towers' names stand for, which is what a run records.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    return dataclasses.replace(config, model=complete_model_config(config.model))


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
        corpus_weights=config.data.corpus_weights,
    )
    return PretrainStream(
        corpora,
        order,
        cut,
        config.data,
        rank=rank,
        seed=config.seed,
        tokenizer=tokenizer,
        image_size_px=config.model.image_size_px,
        max_text_tokens=config.model.text.max_tokens,
        mlm_probability=config.objectives.mlm_probability,
    )


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
            exact_resize=config.data.exact_resize,
            cache=open_cache(config.data),
        )
        for folder in config.data.eval_shards
    ]


def check_held_out(data: DataConfig, train: Corpora | None = None) -> None:
    """Stop before anything starts if a held-out folder cannot be scored, is trained on, or two have the same name.

    Raises:
        ConfigError: two folders have the same last name, which would name their scores, or one has pictures that the
            run trains on.
        DataError: a folder is not there, or has a single picture, which there is nothing to tell from.
    """
    folders = data.eval_shards
    names = [place(folder).name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.eval_shards names two folders {name!r}; scores are listed by that name. Rename one."
            )
    trained = image_ids(train) if train is not None and folders else None
    for folder in folders:
        if load_manifest(folder).totals.images < 2:
            raise DataError(
                f"The held-out {folder} has a single image; matching and retrieval need two or more. Give another "
                "folder as data.eval_shards, or none."
            )
        if trained is not None:
            shared = int(np.isin(np.unique(image_ids(open_corpora([folder], data))), trained).sum())
            if shared:
                raise ConfigError(
                    f"{shared:,} pictures of the held-out {folder} are also in data.train_shards (same image_id), so "
                    "its scores would be those of training. Take them out of one, or give other data.eval_shards."
                )


def image_ids(corpora: Corpora) -> npt.NDArray[np.uint64]:
    """The 64-bit image ids of all samples, from the row indexes alone."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return np.concatenate(list(pool.map(lambda shard: load_index(shard)["image_id"], corpora.shard_paths)))


def data_cure(data: DataConfig, ranks: int) -> str:
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
