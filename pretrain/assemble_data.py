"""From a configuration to the data of a run; nothing here trains."""

from __future__ import annotations

import dataclasses

from bridgetower.config.run import RunConfig
from bridgetower.data.corpora import Corpora, open_cache
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.model.sizes import complete_model_config


def complete(config: RunConfig) -> RunConfig:
    """The same with every size that the towers' names stand for, which is what a run records.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    return dataclasses.replace(config, model=complete_model_config(config.model))


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
