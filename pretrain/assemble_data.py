"""The data of a pretraining run: training stream and held-out splits. Nothing here trains."""

from __future__ import annotations

import dataclasses

from bridgetower.config.run import RunConfig
from bridgetower.data.corpora import Corpora, open_cache
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.order import Cut
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.model.sizes import complete_model_config
from bridgetower.run.prepare import build_order


def complete(config: RunConfig) -> RunConfig:
    """Fill in every size that the towers' names stand for; run.json records the result.

    Raises:
        ConfigError: a tower is unknown, or the parts of the model do not fit together.
    """
    return dataclasses.replace(config, model=complete_model_config(config.model))


def build_stream(config: RunConfig, corpora: Corpora, cut: Cut, rank: int, tokenizer: Tokenizer) -> PretrainStream:
    """Build the stream of one rank's training pairs."""
    return PretrainStream(
        corpora,
        build_order(config, corpora),
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
    """Open the held-out splits."""
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
