"""The pretraining runs by name. Each is a function that returns a whole run; nothing else knows their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bridgetower.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FusionConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TextTowerConfig,
    TrackerConfig,
    VisionTowerConfig,
)

# COCO (Karpathy train + restval), Visual Genome, SBU and CC3M: the "4M" images of the paper's Table 9.
_4M_TRAIN = ("shards/coco/train", "shards/coco/restval", "shards/vg", "shards/sbu", "shards/cc3m")
_4M_EVAL = ("shards/coco/test",)


def tiny() -> RunConfig:
    """A few million parameters on the emoji demo corpus: minutes on two CPU cores."""
    width = 128
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            image_size_px=72,
            # 16 patches: on a CPU the vision tower is half of the step.
            vision=VisionTowerConfig(patch_size_px=18, width=width, num_layers=4, num_heads=4),
            text=TextTowerConfig(
                tokenizer="emoji",
                vocabulary_size=1000,
                max_tokens=40,
                width=width,
                num_layers=3,
                num_heads=4,
                num_positions=64,
                dropout=0.0,  # a dozen epochs of a small model: it does not overfit
            ),
            fusion=FusionConfig(width=width, num_layers=2, num_heads=4, dropout=0.0),
        ),
        objectives=ObjectivesConfig(itc=True, itc_width=128),
        data=DataConfig(
            train_shards=("shards/emoji/train",),
            eval_shards=("shards/emoji/combination", "shards/emoji/concept"),
            global_batch_size=64,
            micro_batch_size=32,
            workers=0,
        ),
        optim=OptimConfig(base_lr=1e-3, total_steps=900, fusion_lr_scale=1.0, head_lr_scale=1.0, max_grad_norm=1.0),
        evaluation=EvaluationConfig(every_steps=300),
        checkpoint=CheckpointConfig(every_steps=300),
        tracker=TrackerConfig(every_steps=10),
    )


def base_4m() -> RunConfig:
    """BridgeTower-Base as published: 100k steps of 4096 pairs of COCO, VG, SBU and CC3M at 288 px, on 64 GPUs."""
    return RunConfig(
        name="base_4m",
        # arXiv 2206.08657, Table 10 and Appendix A; BridgeTower scripts/pre_train.sh.
        model=ModelConfig(
            image_size_px=288,
            vision=VisionTowerConfig(clip_name="ViT-B-16-quickgelu", weights="openai"),
            text=TextTowerConfig(weights="roberta-base"),
        ),
        data=DataConfig(train_shards=_4M_TRAIN, eval_shards=_4M_EVAL, global_batch_size=4096, micro_batch_size=32),
        optim=OptimConfig(base_lr=1e-5, total_steps=100_000, warmup_fraction=0.1),
        engine=EngineConfig(deepspeed="zero2_bf16"),
        evaluation=EvaluationConfig(every_steps=5_000),
    )


def large_4m() -> RunConfig:
    """BridgeTower-Large as published: 100k steps of 4096 pairs of COCO, VG, SBU and CC3M at 294 px, on 64 GPUs."""
    return RunConfig(
        name="large_4m",
        # arXiv 2206.08657, Table 10 and Appendix A; micro-batches of 16 as in BridgeTower scripts/pre_train.sh.
        model=ModelConfig(
            image_size_px=294,
            vision=VisionTowerConfig(
                clip_name="ViT-L-14-quickgelu",
                weights="openai",
                patch_size_px=14,
                width=1024,
                num_layers=24,
                num_heads=16,
            ),
            text=TextTowerConfig(weights="roberta-large", width=1024, num_layers=24, num_heads=16),
            fusion=FusionConfig(width=1024, num_heads=16),
        ),
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
