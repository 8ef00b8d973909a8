"""The settings of a fine-tuning run; those it shares with pretraining are in ``schema``."""

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
"""In place of a checkpoint: only the towers are pretrained, as model.vision.weights and model.text.weights say."""

HEADS: dict[str, tuple[str, ...]] = {
    "vqa": ("vqa",),
    "snli_ve": ("snli_ve",),
    "nlvr2": ("nlvr2",),
    "retrieval": ("itm", "itc"),
}
"""The model's heads that each task reads."""

SELECTION_METRICS: dict[str, str] = {
    "vqa": "vqa_score",
    "snli_ve": "accuracy",
    "nlvr2": "accuracy",
    "retrieval": "r_mean",
}
"""The score that picks the best weights, for each task."""


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(ReadingConfig):
    """What is read, and how it is cut into batches."""

    augmentation: Literal["none", "flip_14_ops", "no_flip_10_ops"] = "none"
    """Of training pictures, a function of seed and position. Both crop half of the picture or more; flip_14_ops then
    mirrors every other one and applies two of RandAugment's 14 changes at strength 7 of 30; no_flip_10_ops applies each
    of two of 10 changes to every other one, at level 5 of 10."""
    negative_group_size: int = 0
    """Retrieval: ITM's hard negatives are drawn within this many consecutive pairs, whatever the number of ranks. The
    published code draws within the micro-batch. 0 where a task has no negatives."""


@dataclass(frozen=True, kw_only=True)
class FinetuneComputeConfig:
    """How much memory and time a step takes. Losses and gradients are the same with all of it off."""

    recompute: tuple[str, ...] = ()
    """Parts whose layers are computed again in the backward pass instead of kept: some of vision, text, fusion."""
    compile: bool = False
    """torch.compile of what the layers are made of; the first step then takes minutes."""


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluationConfig:
    """Scores on held-out data, and which weights they select."""

    every_epochs: float = 1.0
    """Evaluate after every so many passes over the training data; 0 only at the end."""
    batch_size: int = 64
    """Pairs (retrieval: images, captions or pairs) of one forward pass."""
    rerank_top_k: int = 128
    """Retrieval: candidates per query that the cross-modal encoder scores after ITC has found them."""
    rerank_score: Literal["itm_logit", "itm"] = "itm_logit"
    """Retrieval: ranks them by ITM's logit of a match alone, as published, or by its log odds of a match."""
    selection_split: str = ""
    """Name of the held-out split whose score selects the best weights; empty: the first of data.eval_shards."""
    on_trained_pictures: bool = False
    """True accepts held-out pictures that are trained on, as the published code does for VQAv2, whose validation
    questions it trains on. Their scores are those of training."""

    def __post_init__(self) -> None:
        if self.every_epochs < 0:
            raise ConfigError(f"evaluation.every_epochs={self.every_epochs} must be 0 (only at the end) or more.")
        for name in ("batch_size", "rerank_top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}={getattr(self, name)} must be greater than 0.")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run, whole."""

    name: str
    """Folder of the run below run_root."""
    task: TaskName
    """What is learned: vqa (answers to questions), snli_ve (whether a picture entails a sentence), nlvr2 (whether a
    sentence about two pictures is true), retrieval (which caption belongs to which picture)."""
    init: str = ""
    """Where the weights come from: a pretraining run, a checkpoint, a safetensors export, a Hugging Face folder or hub
    name, or a .ckpt of the published code; none starts from the towers' own weights."""
    run_root: str = "runs"
    """Folder that holds the runs."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint if there is one, never refuses a folder that has one,
    PATH starts from that run folder or checkpoint of the same task."""
    seed: int = 0
    """Of everything random: order, augmentation, negatives, initial weights of new heads and dropout."""
    epochs: float = 10.0
    """Passes over the training data, where optim.total_steps is 0."""
    model: ModelConfig
    """Sizes have to be those of ``init``; image_size_px, text.max_tokens, dropout and new heads are this run's."""
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
            raise ConfigError(f"epochs={self.epochs} must be greater than 0.")
        if self.task == "retrieval" and self.data.negative_group_size < 2:
            raise ConfigError(
                f"data.negative_group_size={self.data.negative_group_size} must be 2 or more: retrieval draws a pair's "
                "hard negatives from the other pairs of its group. The paper's micro-batches are 8 (Flickr30K) and 16 "
                "(COCO)."
            )
        if self.task != "retrieval" and self.data.negative_group_size:
            raise ConfigError(
                f"data.negative_group_size={self.data.negative_group_size} is of task=retrieval; {self.task} has no "
                "negatives. Leave it out."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """The model's heads that the task reads."""
        return HEADS[self.task]
