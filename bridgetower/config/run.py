"""Every setting of a pretraining run: typed, frozen, documented, and refusing nonsense."""

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
    """The pretraining losses; those switched on are summed with weight 1, as published."""

    mlm: bool = True
    """Masked language modelling on the true image."""
    itm: bool = True
    """Image-text matching: half of the captions are shown with another pair's image."""
    itc: bool = False
    """Image-text contrast of the towers' class tokens over all ranks' micro-batches."""
    mlm_probability: float = 0.15
    """Share of tokens to predict."""

    def __post_init__(self) -> None:
        if not (self.mlm or self.itm):
            raise ConfigError(
                "objectives.mlm and objectives.itm are both off, so nothing trains the cross-modal layers. "
                "Switch at least one on; for contrast alone train the towers with open_clip."
            )
        if not 0.0 < self.mlm_probability < 1.0:
            raise ConfigError(
                f"objectives.mlm_probability={self.mlm_probability} is not in (0, 1); the paper has 0.15."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """The model's heads that the active objectives need."""
        return tuple(name for name in ("mlm", "itm", "itc") if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs it."""

    deepspeed: str = "auto"
    """A file of ds_configs/ without .json, or a path; auto is zero2_bf16 where the device computes in bfloat16 by
    itself (GPUs, CPUs with avx512_bf16 or AMX), otherwise zero2_fp32."""
    threads_per_rank: int = 0
    """CPU threads of each rank's computation; 0 shares the cores among the ranks of the node."""

    def __post_init__(self) -> None:
        if self.threads_per_rank < 0:
            raise ConfigError(f"engine.threads_per_rank={self.threads_per_rank} must be 0 (share the cores) or more.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores on held-out data."""

    every_steps: int = 0
    """Evaluate during training every so many steps; 0 only at its end."""
    batch_size: int = 64
    """Images, captions or pairs of one forward pass."""
    max_images: int = 1000
    """Of each split, its first images with all their captions; 0 takes all."""
    max_images_without_itc: int = 100
    """Without ITC, retrieval asks ITM for every pair of so many images and their captions."""
    rerank_top_k: int = 16
    """Candidates per query that the cross-modal encoder scores again, with ITC on."""
    rerank_score: Literal["itm_and_itc", "itm", "itm_logit"] = "itm_and_itc"
    """itm ranks them by ITM's log odds of a match, itm_logit by its logit of a match alone, as published; itm_and_itc
    adds ITC's logit to the log odds, as pretraining's ITM has only seen random negatives and ITC tells close ones
    apart."""
    num_samples: int = 24
    """Pictures kept in predictions.json for the report, for each split."""

    def __post_init__(self) -> None:
        check_positive(evaluation__batch_size=self.batch_size, evaluation__rerank_top_k=self.rerank_top_k)
        if self.max_images_without_itc < 2:
            raise ConfigError(
                f"evaluation.max_images_without_itc={self.max_images_without_itc} must be 2 or more, to choose from."
            )
        if self.max_images == 1:
            raise ConfigError("evaluation.max_images=1 leaves nothing to choose from. Use 0 (all) or 2 or more.")
        if min(self.every_steps, self.max_images, self.num_samples) < 0:
            raise ConfigError(
                f"evaluation.every_steps={self.every_steps}, evaluation.max_images={self.max_images} and "
                f"evaluation.num_samples={self.num_samples} must be 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step and each that is followed by an evaluation are saved, too."""
    keep_last: int = 3
    """Older ones are deleted; 0 keeps all."""

    def __post_init__(self) -> None:
        check_positive(checkpoint__every_steps=self.every_steps)
        if self.keep_last < 0:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be 0 (keep all) or more.")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics go, beside metrics.jsonl."""

    every_steps: int = 50
    """Steps between two lines of metrics."""
    wandb: Literal["off", "auto", "online", "offline"] = "auto"
    """auto does what WANDB_MODE says, else is online where a key is set, else offline (files in the run folder, for
    `wandb sync`)."""
    wandb_project: str = "bridgetower"
    """Project of the dashboard."""
    wandb_entity: str = ""
    """Team of the dashboard; empty is the account's own."""

    def __post_init__(self) -> None:
        check_positive(tracker__every_steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run, whole."""

    name: str
    """Folder of the run below run_root."""
    run_root: str = "runs"
    """Folder that holds the runs."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint if there is one, never refuses a folder that has one,
    PATH starts from that run folder or checkpoint."""
    seed: int = 0
    """Of everything random: order, masks, negatives, initial weights and dropout."""
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
    """Check what every kind of run has.

    Raises:
        ConfigError: the name cannot be a folder's, or the seed is negative.
    """
    if not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"name={name!r} must be a folder name without '/'. The folder above is run_root.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be 0 or more.")
