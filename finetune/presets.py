"""The fine-tuning presets. Each is a function that returns a complete run; nothing else depends on its name.

A value that arXiv 2206.08657, Table 11, or the published scripts give is taken from there; docs/finetune.md lists the
source of each value.
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
"""Folder of the files that engine.deepspeed names."""

_GPU = EngineConfig(deepspeed="zero2_bf16")
# The paper fine-tunes the large model on VQAv2 alone, at 0.4 times the base model's learning rate. The large presets of
# the other tasks use that factor too.
# 27 x 14: the multiple of the large model's 14 px patches that is nearest to the base model's 384 px.
_LARGE_PX = 378


def _model(size: str, image_size_px: int, max_text_tokens: int = 50) -> ModelConfig:
    model = MODELS[size]()
    return replace(model, image_size_px=image_size_px, text=replace(model.text, max_tokens=max_text_tokens))


def vqav2_base() -> FinetuneConfig:
    """Fine-tune the base model on VQAv2 at 576 px: 10 epochs in batches of 512. Trains on train, scores on val."""
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
    """Fine-tune the large model on VQAv2 at 574 px: 10 epochs in batches of 512."""
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
    """Fine-tune the base model on SNLI-VE at 384 px: 5 epochs in batches of 64."""
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
    """Fine-tune the base model on NLVR2 at 384 px: 10 epochs in batches of 64."""
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
    """Fine-tune the base model for retrieval on Flickr30K at 384 px: 20 epochs in batches of 512.

    On 8 GPUs ITC contrasts 64 pairs.
    """
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
    """Fine-tune the base model for retrieval on COCO at 384 px: 30 epochs in batches of 256.

    On 8 GPUs ITC contrasts 128 pairs.
    """
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
    """Return a base run with the large model and another learning rate."""
    model = _model("large", _LARGE_PX, run.model.text.max_tokens)
    return replace(
        run, name=run.name.replace("_base", "_large"), model=model, optim=replace(run.optim, base_lr=base_lr)
    )


def snli_ve_large() -> FinetuneConfig:
    """Fine-tune the large model on SNLI-VE at 378 px, at 0.4 times the base rate (not published)."""
    return _large(snli_ve_base(), base_lr=1.2e-6)


def nlvr2_large() -> FinetuneConfig:
    """Fine-tune the large model on NLVR2 at 378 px, at 0.4 times the base rate (not published)."""
    return _large(nlvr2_base(), base_lr=2e-6)


def flickr30k_large() -> FinetuneConfig:
    """Fine-tune the large model for retrieval on Flickr30K at 378 px, at 0.4 times the base rate (not published)."""
    return _large(flickr30k_base(), base_lr=2e-6)


def coco_large() -> FinetuneConfig:
    """Fine-tune the large model for retrieval on COCO at 378 px, at 0.4 times the base rate (not published)."""
    return _large(coco_base(), base_lr=1.8e-6)


def _tiny(base: Callable[[], FinetuneConfig]) -> FinetuneConfig:
    """Return a base run's task on the model of pretraining's preset tiny, in small batches."""
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


def _with_docstring(build: Callable[[], FinetuneConfig], docstring: str) -> Callable[[], FinetuneConfig]:
    """Return the tiny preset of a base run, with the docstring that --help lists."""
    preset = partial(_tiny, build)
    preset.__doc__ = docstring
    return preset


PRESETS: Mapping[str, Callable[[], FinetuneConfig]] = {
    **_BASE,
    "vqav2_large": vqav2_large,
    "snli_ve_large": snli_ve_large,
    "nlvr2_large": nlvr2_large,
    "flickr30k_large": flickr30k_large,
    "coco_large": coco_large,
    **{
        f"tiny_{name.removesuffix('_base')}": _with_docstring(build, f"Fine-tune the tiny model as {name}, on a CPU.")
        for name, build in _BASE.items()
    },
}
