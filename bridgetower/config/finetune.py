"""Settings of a fine-tuning run. Sections that it shares with pretraining are defined in run, data, model and optim."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bridgetower.config.data import ReadingConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.optim import OptimConfig
from bridgetower.config.run import CheckpointConfig, EngineConfig, TrackerConfig, check_run
from bridgetower.errors import ConfigError

TaskName = Literal["vqa", "snli_ve", "nlvr2", "retrieval"]

NO_INIT = "none"
"""Value of ``init`` without a checkpoint: only the towers are pretrained (model.vision.weights, model.text.weights)."""

HEADS: dict[str, tuple[str, ...]] = {
    "vqa": ("vqa",),
    "snli_ve": ("snli_ve",),
    "nlvr2": ("nlvr2",),
    "retrieval": ("itm", "itc"),
}
"""Names of the heads that each task uses."""

SELECTION_METRICS: dict[str, str] = {
    "vqa": "vqa_score",
    "snli_ve": "accuracy",
    "nlvr2": "accuracy",
    "retrieval": "r_mean",
}
"""Name of the score that selects the best weights of each task."""


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(ReadingConfig):
    """Shards and batches of a fine-tuning run."""

    augmentation: Literal["none", "flip_14_ops", "no_flip_10_ops"] = "none"
    """Augmentation of training images, which depends only on seed and position. Both recipes crop at least half of the
    image. flip_14_ops then mirrors it with probability 0.5 and applies two of RandAugment's 14 operations at strength 7
    of 30. no_flip_10_ops draws two of 10 operations at level 5 of 10 and applies each with probability 0.5."""
    negative_group_size: int = 0
    """Retrieval: number of consecutive pairs in a group. ITM's hard negatives are drawn within groups, so that they do
    not depend on the number of ranks; the published code draws within the micro-batch. 0 for tasks without
    negatives."""


@dataclass(frozen=True, kw_only=True)
class FinetuneComputeConfig:
    """How a step is computed. No setting changes losses or gradients."""

    recompute: tuple[str, ...] = ()
    """Parts of the model that recompute activations in the backward pass to save memory: any of vision, text,
    fusion."""
    compile: bool = False
    """True: compile the layers' parts with torch.compile; the first step then takes minutes."""


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluationConfig:
    """Evaluation on held-out data, and selection of the best weights."""

    every_epochs: float = 1.0
    """Number of epochs between evaluations; 0 evaluates only at the end."""
    batch_size: int = 64
    """Number of pairs (retrieval: images, captions or pairs) per forward pass."""
    rerank_top_k: int = 128
    """Retrieval: number of candidates per query that the cross-modal encoder re-ranks after ITC."""
    rerank_score: Literal["itm_logit", "itm"] = "itm_logit"
    """Retrieval: score that re-ranks candidates. itm_logit: ITM's logit of a match alone, as published. itm: ITM's log
    odds of a match."""
    selection_split: str = ""
    """Name of the held-out split whose score selects the best weights; empty for the first of data.eval_shards."""
    on_trained_pictures: bool = False
    """True: allow held-out images that are also trained on. The published code does so for VQAv2, as it trains on the
    validation questions. Scores on such images are training scores."""

    def __post_init__(self) -> None:
        if self.every_epochs < 0:
            raise ConfigError(f"evaluation.every_epochs={self.every_epochs} must be 0 (only at the end) or more.")
        for name in ("batch_size", "rerank_top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}={getattr(self, name)} must be greater than 0.")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run."""

    name: str
    """Name of the run, and of its folder in run_root."""
    task: TaskName
    """Task to learn: vqa (answer questions), snli_ve (decide if an image entails a sentence), nlvr2 (decide if a
    sentence about two images is true), retrieval (match captions and images)."""
    init: str = ""
    """Source of the initial weights: a pretraining run, a checkpoint, a safetensors export, a Hugging Face folder or
    hub name, or a .ckpt of the published code. none: only the towers are pretrained (model.*.weights)."""
    run_root: str = "runs"
    """Folder that holds the run folders."""
    resume: str = "auto"
    """auto: continue from the newest good checkpoint, if there is one. never: fail if the run folder already has a
    checkpoint. PATH: start from that run folder or checkpoint of the same task."""
    seed: int = 0
    """Seed of everything random: order, augmentation, negatives, initial weights of new heads and dropout."""
    epochs: float = 10.0
    """Number of passes over the training data, used if optim.total_steps is 0."""
    model: ModelConfig
    """Model settings. Sizes must be those of ``init``; image_size_px, text.max_tokens, dropout and new heads may
    differ."""
    data: FinetuneDataConfig
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    compute: FinetuneComputeConfig = field(default_factory=FinetuneComputeConfig)
    evaluation: FinetuneEvaluationConfig = field(default_factory=FinetuneEvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        check_run(self.name, self.seed)
        if self.epochs <= 0:
            raise ConfigError(f"epochs={self.epochs} must be greater than 0. Give the number of passes over the data.")
        if self.task == "retrieval" and self.data.negative_group_size < 2:
            raise ConfigError(
                f"data.negative_group_size={self.data.negative_group_size} must be 2 or more: retrieval draws a pair's "
                "hard negatives from the other pairs of its group. The paper's micro-batches are 8 (Flickr30K) and 16 "
                "(COCO)."
            )
        if self.task != "retrieval" and self.data.negative_group_size:
            raise ConfigError(
                f"data.negative_group_size={self.data.negative_group_size} is a setting of task=retrieval; "
                f"{self.task} has no negatives. Leave it out."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that the task uses."""
        return HEADS[self.task]
