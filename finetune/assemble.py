"""From a fine-tuning configuration to its model, task and data; nothing here trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridgetower import rng
from bridgetower.config.finetune import NO_INIT, FinetuneConfig
from bridgetower.config.model import CUSTOM, ModelConfig
from bridgetower.config.overrides import walk_fields
from bridgetower.config.snapshot import RUN_FILE, has_checkpoints, read_config
from bridgetower.data.corpora import Corpora, open_cache
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.labelled import LabelledSplit, LabelledStream
from bridgetower.data.order import Cut, Order
from bridgetower.data.targets import count_classes
from bridgetower.data.text import Tokenizer
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.open import load_model
from bridgetower.kernels.compiled import compile_parts
from bridgetower.model.bridgetower import BridgeTower, complete_model_config
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.pretrained import check_vision_weights, load_tower_weights
from finetune.tasks import ClassifierTask, FinetuneTask, RetrievalTask

# What the checkpoint decides and a preset is made for; everything else of model.* may differ.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "vision": ("patch_size_px", "width", "num_layers", "num_heads"),
    "text": ("vocabulary_size", "width", "num_layers", "num_heads"),
    "fusion": ("width", "num_layers", "num_external_layers", "num_heads", "bridge", "multi_layer_fusion"),
}
_TABLE = "modality_embedding.weight"


class Start(NamedTuple):
    """The model that a run starts from."""

    config: ModelConfig
    """Of the run."""
    weights: dict[str, Tensor] | None
    """By name; None where there are none, or where the run's own checkpoint has newer ones."""
    heads: tuple[str, ...] = ()
    """Those of the run that the weights hold."""


def find_start(config: FinetuneConfig, folder: Path) -> Start:
    """Read what ``init`` names, and say which model comes of it.

    A run that has been saved goes on without it: its folder says which model it has.

    Raises:
        CheckpointError: ``init`` cannot be read, or is not whole.
        ConfigError: it is of another size than ``model.*`` says.
    """
    model = complete_model_config(config.model)
    if config.init == NO_INIT:
        check_vision_weights(model.vision)
        return Start(model, None)
    if has_checkpoints(folder):
        saved = read_config(folder / RUN_FILE, FinetuneConfig).model
        joined = _joined(model, saved)
        return Start(_with_itc_of(joined, saved) if "itc" in config.heads else joined, None)
    source = load_model(config.init, image_size_px=model.image_size_px)
    _check_sizes(model, source.config, config.init)
    joined = _joined(model, source.config)
    heads = tuple(name for name in config.heads if name in source.heads)
    if "itc" in heads:
        joined = _with_itc_of(joined, source.config)
    unread = tuple(f"heads.{name}." for name in source.heads if name not in heads)
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith(unread)}
    if "nlvr2" in source.heads and "nlvr2" not in heads and _TABLE in weights:
        weights[_TABLE] = weights[_TABLE][:2]  # the row of NLVR2's second picture goes with its head
    return Start(joined, weights, heads)


def _joined(own: ModelConfig, source: ModelConfig) -> ModelConfig:
    """The model of a checkpoint with what a run may choose."""
    return dataclasses.replace(
        source,
        image_size_px=own.image_size_px,
        text=dataclasses.replace(source.text, max_tokens=own.text.max_tokens, dropout=own.text.dropout),
        fusion=dataclasses.replace(source.fusion, dropout=own.fusion.dropout),
        heads=own.heads,
    )


def _with_itc_of(own: ModelConfig, source: ModelConfig) -> ModelConfig:
    """ITC's head has the width that it was pretrained with."""
    return dataclasses.replace(own, heads=dataclasses.replace(own.heads, itc_width=source.heads.itc_width))


def _check_sizes(own: ModelConfig, source: ModelConfig, init: str) -> None:
    differing, flags = [], []
    for part, names in _SIZES.items():
        ours, theirs = getattr(own, part), getattr(source, part)
        changed = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
        differing += [f"model.{part}.{name}: {getattr(theirs, name)}, not {getattr(ours, name)}" for name in changed]
        if changed and part != "fusion" and theirs.name != CUSTOM:
            flags.append(f"--model.{part}.name={theirs.name}")
        elif changed:
            cure = [name for name, *_ in walk_fields(theirs) if name in names or name in ("name", "num_positions")]
            flags += [
                f"--model.{part}.{name}={getattr(theirs, name)}" for name in (cure if part != "fusion" else changed)
            ]
    if differing:
        raise ConfigError(
            f"init={init} is another model than these settings are for:\n  "
            + "\n  ".join(differing)
            + f"\nUse a preset of its size (tiny_TASK, TASK_base, TASK_large), or add {' '.join(flags)}"
        )


def build_task(config: FinetuneConfig, start: Start) -> FinetuneTask:
    """Model, head and objective with their initial weights, a function of the seed and of ``start``.

    Args:
        config: complete: its model is that of ``start``.

    Raises:
        CheckpointError: the weights have no place in the model, or a head is of another size.
    """
    torch.manual_seed(rng.key(config.seed, "weights") >> 1)
    model = BridgeTower(config.model, config.heads if start.weights is None else start.heads)
    if start.weights is None:
        if config.init == NO_INIT:
            load_tower_weights(model)
    else:
        try:
            model.load_state_dict(start.weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"init={config.init} does not fit, tensor for tensor: {error}\nA head that it has already keeps its "
                "size: set model.heads.* to it, or give a checkpoint from before that fine-tuning."
            ) from error
        for name in config.heads:
            if name not in start.heads:
                model.add_head(name)
    freeze_layers(model, vision=config.optim.frozen_vision_layers, text=config.optim.frozen_text_layers)
    model.compute = dataclasses.replace(model.compute, recompute=config.compute.recompute)
    if config.compute.compile:
        compile_parts(model)
    if config.task == "retrieval":
        return RetrievalTask(model, config.data.negative_group_size)
    return ClassifierTask(model, config.task)


def complete_steps(config: FinetuneConfig, num_pairs: int) -> FinetuneConfig:
    """The same with the number of steps that its epochs come to: so many that no pair is seen less often.

    Args:
        num_pairs: of an epoch.
    """
    if config.optim.total_steps:
        return config
    steps = math.ceil(num_pairs * config.epochs / config.data.global_batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, total_steps=steps))


def evaluation_steps(config: FinetuneConfig, num_pairs: int) -> int:
    """Steps between two evaluations, rounded up as ``complete_steps`` does: the last is then at the end.

    0 only at the end.
    """
    return math.ceil(config.evaluation.every_epochs * num_pairs / config.data.global_batch_size)


def build_order(config: FinetuneConfig, corpora: Corpora) -> Order:
    """The order of the training pairs."""
    return Order(
        corpora.pairs_per_shard,
        corpora.corpus_of_shard,
        seed=config.seed,
        shards_per_window=config.data.shards_per_window,
        corpus_weights=config.data.corpus_weights,
    )


def build_stream(
    config: FinetuneConfig, corpora: Corpora, order: Order, cut: Cut, rank: int, tokenizer: Tokenizer
) -> LabelledStream:
    """The training pairs of one rank."""
    return LabelledStream(
        corpora,
        order,
        cut,
        config.data,
        task=config.task,
        classes=count_classes(config.task, config.model.heads.num_answers),
        rank=rank,
        seed=config.seed,
        **_reading(config, tokenizer),
    )


def build_splits(config: FinetuneConfig, tokenizer: Tokenizer) -> list[LabelledSplit] | list[HeldOutSplit]:
    """The held-out splits: of captions and images for retrieval, else of labelled pairs."""
    shared = {**_reading(config, tokenizer), "exact_resize": config.data.exact_resize}
    if config.task == "retrieval":
        return [
            HeldOutSplit(folder, whole_images=True, mlm_probability=0.0, cache=open_cache(config.data), **shared)
            for folder in config.data.eval_shards
        ]
    return [
        LabelledSplit(
            folder,
            task=config.task,
            classes=count_classes(config.task, config.model.heads.num_answers),
            block_size=config.evaluation.batch_size,
            cache=open_cache(config.data),
            **shared,
        )
        for folder in config.data.eval_shards
    ]


def _reading(config: FinetuneConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "image_size_px": config.model.image_size_px,
        "max_text_tokens": config.model.text.max_tokens,
    }
