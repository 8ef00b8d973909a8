"""The model, task and data of a fine-tuning run, built from its settings. Nothing here trains."""

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
from bridgetower.data.order import Cut
from bridgetower.data.targets import count_classes
from bridgetower.data.text import Tokenizer
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.open import load_model
from bridgetower.kernels.ops import Ops
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.pretrained import check_vision_weights, load_tower_weights
from bridgetower.model.sizes import complete_model_config
from bridgetower.run.prepare import build_order
from finetune.tasks import ClassifierTask, FinetuneTask, RetrievalTask

# Settings of model.* that have to equal the checkpoint's; all others may differ.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "vision": ("patch_size_px", "width", "num_layers", "num_heads"),
    "text": ("vocabulary_size", "width", "num_layers", "num_heads"),
    "fusion": ("width", "num_layers", "num_external_layers", "num_heads", "bridge", "multi_layer_fusion"),
}
_MODALITY_TABLE = "modality_embedding.weight"


class Start(NamedTuple):
    """The model that a run starts from."""

    config: ModelConfig
    """Complete settings of the run's model."""
    weights: dict[str, Tensor] | None
    """Weights by name; None for --init=none, and for a resumed run, whose own checkpoint has newer ones."""
    heads: tuple[str, ...] = ()
    """Heads of the run whose weights are in ``weights``; the run's other heads are new."""


def find_start(config: FinetuneConfig, folder: Path) -> Start:
    """Read the model that ``init`` names, and combine its settings with the run's.

    A resumed run does not need ``init``: its run.json says which model it has.

    Args:
        folder: run folder.

    Raises:
        CheckpointError: ``init`` cannot be read, or is incomplete.
        ConfigError: ``init`` has other sizes than ``model.*`` says.
    """
    model = complete_model_config(config.model)
    if config.init == NO_INIT:
        check_vision_weights(model.vision)
        return Start(model, None)
    if has_checkpoints(folder):
        saved = read_config(folder / RUN_FILE, FinetuneConfig).model
        joined = _join(model, saved)
        return Start(_take_itc_width(joined, saved) if "itc" in config.heads else joined, None)
    source = load_model(config.init, image_size_px=model.image_size_px)
    _check_sizes(model, source.config, config.init)
    joined = _join(model, source.config)
    heads = tuple(name for name in config.heads if name in source.heads)
    if "itc" in heads:
        joined = _take_itc_width(joined, source.config)
    unread = tuple(f"heads.{name}." for name in source.heads if name not in heads)
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith(unread)}
    if "nlvr2" in source.heads and "nlvr2" not in heads and _MODALITY_TABLE in weights:
        # The third row, of NLVR2's second image, exists only beside NLVR2's head.
        weights[_MODALITY_TABLE] = weights[_MODALITY_TABLE][:2]
    return Start(joined, weights, heads)


def _join(run: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Return the model of a checkpoint with the settings that a run may choose for itself."""
    return dataclasses.replace(
        source,
        image_size_px=run.image_size_px,
        text=dataclasses.replace(source.text, max_tokens=run.text.max_tokens, dropout=run.text.dropout),
        fusion=dataclasses.replace(source.fusion, dropout=run.fusion.dropout),
        heads=run.heads,
    )


def _take_itc_width(run: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Give ITC's head the width that it was pretrained with."""
    return dataclasses.replace(run, heads=dataclasses.replace(run.heads, itc_width=source.heads.itc_width))


def _check_sizes(run: ModelConfig, source: ModelConfig, init: str) -> None:
    """Raise ConfigError if the sizes of a checkpoint are not the run's; the error lists the flags that repair it."""
    differences, flags = [], []
    for section, names in _SIZES.items():
        wanted, given = getattr(run, section), getattr(source, section)
        changed = [name for name in names if getattr(wanted, name) != getattr(given, name)]
        differences += [
            f"model.{section}.{name}: {getattr(given, name)}, not {getattr(wanted, name)}" for name in changed
        ]
        if not changed:
            continue
        if section == "fusion":
            repairs = changed
        elif given.name != CUSTOM:
            repairs = ["name"]  # the tower's name stands for all of its sizes
        else:
            repairs = [name for name, *_ in walk_fields(given) if name in names or name in ("name", "num_positions")]
        flags += [f"--model.{section}.{name}={getattr(given, name)}" for name in repairs]
    if differences:
        raise ConfigError(
            f"init={init} has other sizes than these settings:\n  "
            + "\n  ".join(differences)
            + f"\nUse a preset of its size (tiny_TASK, TASK_base, TASK_large), or add {' '.join(flags)}"
        )


def build_task(config: FinetuneConfig, start: Start, ops: Ops | None = None) -> FinetuneTask:
    """Build model, heads and objective with initial weights that depend only on the seed and on ``start``.

    Args:
        config: complete, with the model of ``start``.
        ops: what computes the layers; None: the fastest operations of this machine.

    Raises:
        CheckpointError: the weights do not fit the model, e.g. a head has another size.
    """
    torch.manual_seed(rng.key(config.seed, "weights") >> 1)
    heads = config.heads if start.weights is None else start.heads
    model = BridgeTower(config.model, heads, ops=ops, recompute=config.compute.recompute)
    if start.weights is None:
        if config.init == NO_INIT:
            load_tower_weights(model)
    else:
        try:
            model.load_state_dict(start.weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"The tensors of init={config.init} do not fit this model: {error}\nA head that a checkpoint already "
                "has keeps its size: set model.heads.* to that size, or give a checkpoint from before that fine-tuning."
            ) from error
        for name in config.heads:
            if name not in start.heads:
                model.add_head(name)
    freeze_layers(model, vision=config.optim.frozen_vision_layers, text=config.optim.frozen_text_layers)
    if config.task == "retrieval":
        return RetrievalTask(model, config.data.negative_group_size)
    return ClassifierTask(model, config.task)


def complete_steps(config: FinetuneConfig, num_pairs: int) -> FinetuneConfig:
    """Set ``optim.total_steps`` to the steps of ``epochs``, rounded up so that every pair is seen that often.

    Args:
        num_pairs: pairs per epoch.
    """
    if config.optim.total_steps:
        return config
    steps = math.ceil(num_pairs * config.epochs / config.data.global_batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, total_steps=steps))


def evaluation_steps(config: FinetuneConfig, num_pairs: int) -> int:
    """Return the steps between two evaluations; 0 evaluates only at the end.

    Rounded up as ``complete_steps`` does, so that the last evaluation falls on the last step.
    """
    return math.ceil(config.evaluation.every_epochs * num_pairs / config.data.global_batch_size)


def build_stream(config: FinetuneConfig, corpora: Corpora, cut: Cut, rank: int, tokenizer: Tokenizer) -> LabelledStream:
    """Build the stream of one rank's training pairs."""
    return LabelledStream(
        corpora,
        build_order(config, corpora),
        cut,
        config.data,
        task=config.task,
        classes=count_classes(config.task, config.model.heads.num_answers),
        rank=rank,
        seed=config.seed,
        **_input_sizes(config, tokenizer),
    )


def build_splits(config: FinetuneConfig, tokenizer: Tokenizer) -> list[LabelledSplit] | list[HeldOutSplit]:
    """Open the held-out splits: captions and images for retrieval, labelled pairs for the other tasks."""
    shared = {**_input_sizes(config, tokenizer), "exact_resize": config.data.exact_resize}
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


def _input_sizes(config: FinetuneConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the arguments that training and held-out data share."""
    return {
        "tokenizer": tokenizer,
        "image_size_px": config.model.image_size_px,
        "max_text_tokens": config.model.text.max_tokens,
    }
