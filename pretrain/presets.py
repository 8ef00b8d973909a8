"""The pretraining presets. Each is a function that returns a complete run; nothing else depends on its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bridgetower.config.data import DataConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.optim import OptimConfig
from bridgetower.config.run import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    ObjectivesConfig,
    RunConfig,
    TrackerConfig,
)

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
"""Folder of the files that engine.deepspeed names."""

# COCO (Karpathy train + restval), Visual Genome, SBU and CC3M: the "4M" images of the paper's Table 9.
_4M_TRAIN = ("shards/coco/train", "shards/coco/restval", "shards/vg", "shards/sbu", "shards/cc3m/train")
_4M_EVAL = ("shards/coco/test",)


def with_published_towers(model: ModelConfig) -> ModelConfig:
    """Set the towers' initial weights to OpenAI's CLIP and to RoBERTa, as in every published model."""
    return replace(
        model,
        vision=replace(model.vision, weights="openai"),
        text=replace(model.text, weights=model.text.name),
    )


def tiny() -> RunConfig:
    """Pretrain a few million parameters on the emoji demo corpus, in minutes on two CPU cores."""
    return RunConfig(
        name="tiny",
        model=MODELS["tiny"](),
        objectives=ObjectivesConfig(itc=True),
        data=DataConfig(
            train_shards=("shards/emoji/train",),
            eval_shards=("shards/emoji/combination", "shards/emoji/concept"),
            global_batch_size=64,
            micro_batch_size=32,
            workers=0,
        ),
        optim=OptimConfig(base_lr=1e-3, total_steps=720, fusion_lr_scale=1.0, head_lr_scale=1.0, max_grad_norm=1.0),
        evaluation=EvaluationConfig(every_steps=360),
        checkpoint=CheckpointConfig(every_steps=360),
        tracker=TrackerConfig(every_steps=10, wandb="off"),
    )


def base_4m() -> RunConfig:
    """Pretrain BridgeTower-Base as published: 100k steps of 4096 pairs (COCO, VG, SBU, CC3M), 288 px, 64 GPUs."""
    return RunConfig(
        name="base_4m",
        # arXiv 2206.08657, Table 10 and Appendix A; BridgeTower scripts/pre_train.sh.
        model=with_published_towers(MODELS["base"]()),
        data=DataConfig(train_shards=_4M_TRAIN, eval_shards=_4M_EVAL, global_batch_size=4096, micro_batch_size=32),
        optim=OptimConfig(base_lr=1e-5, total_steps=100_000, warmup_fraction=0.1),
        engine=EngineConfig(deepspeed="zero2_bf16"),
        evaluation=EvaluationConfig(every_steps=5_000),
    )


def large_4m() -> RunConfig:
    """Pretrain BridgeTower-Large as published: 100k steps of 4096 pairs (COCO, VG, SBU, CC3M), 294 px, 64 GPUs."""
    return RunConfig(
        name="large_4m",
        # arXiv 2206.08657, Table 10 and Appendix A; micro-batches of 16 from BridgeTower scripts/pre_train.sh.
        model=with_published_towers(MODELS["large"]()),
        data=DataConfig(
            train_shards=_4M_TRAIN,
            eval_shards=_4M_EVAL,
            global_batch_size=4096,
            micro_batch_size=16,
            negative_group_size=16,
        ),
        optim=OptimConfig(base_lr=1e-5, total_steps=100_000, warmup_fraction=0.1),
        engine=EngineConfig(deepspeed="zero2_bf16"),
        evaluation=EvaluationConfig(every_steps=5_000),
    )


PRESETS: Mapping[str, Callable[[], RunConfig]] = {"tiny": tiny, "base_4m": base_4m, "large_4m": large_4m}
