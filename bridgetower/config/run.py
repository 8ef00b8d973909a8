"""Settings of a pretraining run, and the sections that fine-tuning shares with it.

Each section is typed and frozen, and checks its own values. A docstring below a field is its text in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bridgetower.config.checks import check_positive
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.data import DataConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.optim import OptimConfig
from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """Pretraining losses. Active ones are summed with weight 1, as published."""

    mlm: bool = True
    """Masked language modelling, with the caption's own image."""
    itm: bool = True
    """Image-text matching: half of the captions are paired with the image of another pair."""
    itc: bool = False
    """Image-text contrastive loss on the towers' class tokens, over the micro-batches of all ranks."""
    mlm_probability: float = 0.15
    """Fraction of tokens that MLM predicts."""

    def __post_init__(self) -> None:
        if not (self.mlm or self.itm):
            raise ConfigError(
                "objectives.mlm and objectives.itm are both off, so nothing trains the cross-modal layers. "
                "Switch at least one on; to train the towers with contrast alone, use open_clip."
            )
        if not 0.0 < self.mlm_probability < 1.0:
            raise ConfigError(
                f"objectives.mlm_probability={self.mlm_probability} is not in (0, 1); the paper uses 0.15."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that the active objectives need."""
        return tuple(name for name in ("mlm", "itm", "itc") if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed and CPU threads."""

    deepspeed: str = "auto"
    """Name of a file in ds_configs/ without .json, or a path. auto takes zero2_bf16 on devices with bfloat16 arithmetic
    (GPUs, CPUs with avx512_bf16 or AMX) and zero2_fp32 on others."""
    threads_per_rank: int = 0
    """Number of CPU threads per rank; 0 divides the cores among the ranks of the node."""

    def __post_init__(self) -> None:
        if self.threads_per_rank < 0:
            raise ConfigError(f"engine.threads_per_rank={self.threads_per_rank} must be 0 (divide the cores) or more.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out data."""

    every_steps: int = 0
    """Number of steps between evaluations; 0 evaluates only at the end."""
    batch_size: int = 64
    """Number of images, captions or pairs per forward pass."""
    max_images: int = 1000
    """Number of images per split, the first ones, with all their captions; 0 takes all."""
    max_images_without_itc: int = 100
    """Number of images for retrieval without ITC, where ITM scores every image with every caption."""
    rerank_top_k: int = 16
    """Number of candidates per query that the cross-modal encoder re-ranks after ITC."""
    rerank_score: Literal["itm_and_itc", "itm", "itm_logit"] = "itm_and_itc"
    """Score that re-ranks candidates. itm: ITM's log odds of a match. itm_logit: ITM's logit of a match alone, as
    published. itm_and_itc: log odds plus ITC's logit, as pretraining's ITM has only seen random negatives and ITC
    separates close candidates."""
    num_samples: int = 24
    """Number of images per split that predictions.json keeps for the report."""

    def __post_init__(self) -> None:
        check_positive(evaluation__batch_size=self.batch_size, evaluation__rerank_top_k=self.rerank_top_k)
        if self.max_images_without_itc < 2:
            raise ConfigError(
                f"evaluation.max_images_without_itc={self.max_images_without_itc} must be 2 or more: "
                "retrieval chooses among images."
            )
        if self.max_images == 1:
            raise ConfigError(
                "evaluation.max_images=1 leaves retrieval nothing to choose from. Use 0 (all) or 2 or more."
            )
        if min(self.every_steps, self.max_images, self.num_samples) < 0:
            raise ConfigError(
                f"evaluation.every_steps={self.every_steps}, evaluation.max_images={self.max_images} and "
                f"evaluation.num_samples={self.num_samples} must be 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and deleted."""

    every_steps: int = 1000
    """Number of steps between checkpoints. The last step and every step before an evaluation are saved, too."""
    keep_last: int = 3
    """Number of newest checkpoints that are kept; 0 keeps all."""

    def __post_init__(self) -> None:
        check_positive(checkpoint__every_steps=self.every_steps)
        if self.keep_last < 0:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be 0 (keep all) or more.")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Logging of metrics, in metrics.jsonl and W&B."""

    every_steps: int = 50
    """Number of steps between two lines of metrics."""
    wandb: Literal["off", "auto", "online", "offline"] = "auto"
    """Mode of the W&B dashboard. auto: WANDB_MODE if it is set, else online if a key is set, else offline (files in the
    run folder, for `wandb sync`)."""
    wandb_project: str = "bridgetower"
    """W&B project."""
    wandb_entity: str = ""
    """W&B team; empty is the account's default."""

    def __post_init__(self) -> None:
        check_positive(tracker__every_steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    name: str
    """Name of the run, and of its folder in run_root."""
    run_root: str = "runs"
    """Folder that holds the run folders."""
    resume: str = "auto"
    """auto: continue from the newest good checkpoint, if there is one. never: fail if the run folder already has a
    checkpoint. PATH: start from that run folder or checkpoint."""
    seed: int = 0
    """Seed of everything random: order, masks, negatives, initial weights and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        check_run(self.name, self.seed)
        check_positive(optim__total_steps=self.optim.total_steps)


def check_run(name: str, seed: int) -> None:
    """Check the name and the seed of a pretraining or fine-tuning run.

    Raises:
        ConfigError: the name is not a valid folder name, or the seed is negative.
    """
    if not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"name={name!r} must be a folder name without '/'. The folder above is run_root.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be 0 or more. Give a non-negative integer.")
