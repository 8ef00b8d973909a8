"""The fine-tuning runs by name. Each is a function that returns a whole run; nothing else knows their names.

Values that have a number in arXiv 2206.08657, Table 11, or in the published scripts are those; docs/finetune.md says
which is from where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from bridgetower.config.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneEvaluationConfig,
)
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.optim import OptimConfig
from bridgetower.config.run import CheckpointConfig, EngineConfig, TrackerConfig

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
"""Where engine.deepspeed looks for a name."""

_GPU = EngineConfig(deepspeed="zero2_bf16")
# Only VQAv2 was published with the large model, at 0.4 times the base model's rate. So are the others here.
# 27 patches of 14 pixels a side: the nearest to 384 pixels that the large model can read.
_LARGE_PX = 378


def _model(size: str, image_size_px: int, max_text_tokens: int = 50) -> ModelConfig:
    model = MODELS[size]()
    return replace(model, image_size_px=image_size_px, text=replace(model.text, max_tokens=max_text_tokens))


def vqav2_base() -> FinetuneConfig:
    """VQAv2, base model at 576 px: 10 epochs in batches of 512. Trained on train, scored on val."""
    return FinetuneConfig(
        name="vqav2_base",
        task="vqa",
        # arXiv 2206.08657, Table 11; BridgeTower scripts/ftfpt_base_vqa.sh.
        model=_model("base", 576),
        data=FinetuneDataConfig(
            train_shards=("shards/vqav2/train",),
            eval_shards=("shards/vqav2/val",),
            global_batch_size=512,
            micro_batch_size=16,
            augmentation="no_flip_10_ops",
        ),
        optim=OptimConfig(base_lr=1e-5, total_steps=0, warmup_fraction=0.06, head_lr_scale=50.0, weight_decay=0.05),
        epochs=10,
        engine=_GPU,
    )


def vqav2_large() -> FinetuneConfig:
    """VQAv2, large model at 574 px: 10 epochs in batches of 512."""
    base = vqav2_base()
    return replace(
        base,
        name="vqav2_large",
        # arXiv 2206.08657, Table 11; BridgeTower scripts/ftfpt_large_vqa.sh.
        model=_model("large", 574),
        data=replace(base.data, micro_batch_size=4),
        optim=replace(base.optim, base_lr=4e-6),
    )


def snli_ve_base() -> FinetuneConfig:
    """SNLI-VE, base model at 384 px: 5 epochs in batches of 64."""
    return FinetuneConfig(
        name="snli_ve_base",
        task="snli_ve",
        # arXiv 2206.08657, Table 11; BridgeTower scripts/ftfpt_base_snlive.sh.
        model=_model("base", 384),
        data=FinetuneDataConfig(
            train_shards=("shards/snli_ve/train",),
            eval_shards=("shards/snli_ve/dev", "shards/snli_ve/test"),
            global_batch_size=64,
            micro_batch_size=8,
            augmentation="flip_14_ops",
        ),
        optim=OptimConfig(base_lr=3e-6, total_steps=0, warmup_fraction=0.06, head_lr_scale=10.0),
        epochs=5,
        engine=_GPU,
    )


def nlvr2_base() -> FinetuneConfig:
    """NLVR2, base model at 384 px: 10 epochs in batches of 64."""
    return FinetuneConfig(
        name="nlvr2_base",
        task="nlvr2",
        # BridgeTower scripts/ftfpt_base_nlvr2.sh.
        model=_model("base", 384),
        data=FinetuneDataConfig(
            train_shards=("shards/nlvr2/train",),
            eval_shards=("shards/nlvr2/dev", "shards/nlvr2/test1"),
            global_batch_size=64,
            micro_batch_size=8,
            augmentation="flip_14_ops",
        ),
        optim=OptimConfig(base_lr=5e-6, total_steps=0, warmup_fraction=0.1, head_lr_scale=10.0, weight_decay=0.008),
        epochs=10,
        engine=_GPU,
    )


def flickr30k_base() -> FinetuneConfig:
    """Retrieval on Flickr30K, base model at 384 px: 20 epochs in batches of 512, contrast over 64 pairs on 8 GPUs."""
    return FinetuneConfig(
        name="flickr30k_base",
        task="retrieval",
        # arXiv 2206.08657, Table 11; BridgeTower scripts/ftfpt_base_irtr_itm_itc_flickr.sh.
        model=_model("base", 384, max_text_tokens=40),
        data=FinetuneDataConfig(
            train_shards=("shards/flickr30k/train",),
            eval_shards=("shards/flickr30k/val", "shards/flickr30k/test"),
            global_batch_size=512,
            micro_batch_size=8,
            negative_group_size=8,
            augmentation="flip_14_ops",
        ),
        optim=OptimConfig(base_lr=5e-6, total_steps=0, warmup_fraction=0.05),
        epochs=20,
        engine=_GPU,
        evaluation=FinetuneEvaluationConfig(rerank_top_k=128),
    )


def coco_base() -> FinetuneConfig:
    """Retrieval on COCO, base model at 384 px: 30 epochs in batches of 256, contrast over 128 pairs on 8 GPUs."""
    return FinetuneConfig(
        name="coco_base",
        task="retrieval",
        # BridgeTower scripts/ftfpt_base_irtr_itm_itc_coco.sh.
        model=_model("base", 384, max_text_tokens=40),
        data=FinetuneDataConfig(
            train_shards=("shards/coco_retrieval/train", "shards/coco_retrieval/restval"),
            eval_shards=("shards/coco_retrieval/val", "shards/coco_retrieval/test"),
            global_batch_size=256,
            micro_batch_size=16,
            negative_group_size=16,
            augmentation="flip_14_ops",
        ),
        optim=OptimConfig(base_lr=4.5e-6, total_steps=0, warmup_fraction=0.1),
        epochs=30,
        engine=_GPU,
        evaluation=FinetuneEvaluationConfig(rerank_top_k=256),
    )


def _large(run: FinetuneConfig, base_lr: float) -> FinetuneConfig:
    model = _model("large", _LARGE_PX, run.model.text.max_tokens)
    return replace(
        run, name=run.name.replace("_base", "_large"), model=model, optim=replace(run.optim, base_lr=base_lr)
    )


def snli_ve_large() -> FinetuneConfig:
    """SNLI-VE, large model at 378 px: the base run's values at 0.4 times its rate; not published."""
    return _large(snli_ve_base(), base_lr=1.2e-6)


def nlvr2_large() -> FinetuneConfig:
    """NLVR2, large model at 378 px: the base run's values at 0.4 times its rate; not published."""
    return _large(nlvr2_base(), base_lr=2e-6)


def flickr30k_large() -> FinetuneConfig:
    """Retrieval on Flickr30K, large model at 378 px: the base run's values at 0.4 times its rate; not published."""
    return _large(flickr30k_base(), base_lr=2e-6)


def coco_large() -> FinetuneConfig:
    """Retrieval on COCO, large model at 378 px: the base run's values at 0.4 times its rate; not published."""
    return _large(coco_base(), base_lr=1.8e-6)


def _tiny(base: Callable[[], FinetuneConfig]) -> FinetuneConfig:
    """The same task on the model of pretraining's preset tiny, in small batches."""
    run = base()
    return replace(
        run,
        name=f"tiny_{run.name.removesuffix('_base')}",
        model=MODELS["tiny"](),
        data=replace(
            run.data,
            global_batch_size=16,
            micro_batch_size=8,
            negative_group_size=4 if run.task == "retrieval" else 0,
            workers=0,
        ),
        optim=replace(run.optim, base_lr=3e-4, fusion_lr_scale=1.0, head_lr_scale=3.0, max_grad_norm=1.0),
        engine=EngineConfig(),
        evaluation=replace(run.evaluation, rerank_top_k=16),
        checkpoint=CheckpointConfig(every_steps=200),
        tracker=TrackerConfig(every_steps=10, wandb="off"),
    )


_BASE = {
    "vqav2_base": vqav2_base,
    "snli_ve_base": snli_ve_base,
    "nlvr2_base": nlvr2_base,
    "flickr30k_base": flickr30k_base,
    "coco_base": coco_base,
}


def _described(build: Callable[[], FinetuneConfig], text: str) -> Callable[[], FinetuneConfig]:
    found = partial(_tiny, build)
    found.__doc__ = text
    return found


PRESETS: Mapping[str, Callable[[], FinetuneConfig]] = {
    **_BASE,
    "vqav2_large": vqav2_large,
    "snli_ve_large": snli_ve_large,
    "nlvr2_large": nlvr2_large,
    "flickr30k_large": flickr30k_large,
    "coco_large": coco_large,
    **{
        f"tiny_{name.removesuffix('_base')}": _described(build, f"The task of {name} on the tiny model, on a CPU.")
        for name, build in _BASE.items()
    },
}
