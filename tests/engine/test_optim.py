"""Parameter groups as published, their rates over time, and which AdamW updates them."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from bridgetower.config.optim import OptimConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.engine.optim import (
    build_optimizer,
    build_schedule,
    choose_implementation,
    compute_lr_factor,
    group_parameters,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from pretrain.presets import PRESETS
from tests.small_models import small_task

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def settings(**changes) -> OptimConfig:
    return OptimConfig(**{"base_lr": 1e-5, "total_steps": 100_000, **changes})


@lru_cache
def published_task(preset, itc=False) -> PretrainTask:
    """Build a task on the meta device: it has names and shapes, and takes no memory."""
    config = PRESETS[preset]()
    with torch.device("meta"):
        objectives = ObjectivesConfig(itc=itc)
        return PretrainTask(BridgeTower(config.model, objectives.heads), objectives)


def names_by_group(task, optim) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in group_parameters(task, optim)}


# Tensors and parameters of each group of the published code (reference_spec 3.1), minus those that nothing reads, which
# do not exist here: RoBERTa's pooler (a square matrix and its bias), from CLIP's text side a position table
# [77, 512 or 768] and the two vectors of a norm, and without ITC the temperature.
PUBLISHED = {
    "base_4m": {
        "base": (157 - 4, 210_359_809 - 768 * 768 - 77 * 512 - 512 - 1),
        "base_no_decay": (198 - 2, 225_536 - 768 - 512),
        "head": (3, 39_196_416),
        "head_no_decay": (5, 52_571),
        "fusion": (124, 115_605_504),
        "fusion_no_decay": (220, 196_608),
    },
    "large_4m": {
        "base": (301 - 4, 658_195_969 - 1024 * 1024 - 77 * 768 - 768 - 1),
        "base_no_decay": (390 - 2, 595_712 - 1024 - 768),
        "head": (3, 52_524_032),
        "head_no_decay": (5, 53_339),
        "fusion": (124, 205_520_896),
        "fusion_no_decay": (220, 262_144),
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_groups_are_the_published_ones_to_the_parameter(preset):
    groups = group_parameters(published_task(preset), settings(decay_like_reference=True))
    sizes = {g["name"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups}
    assert sizes == PUBLISHED[preset]


@pytest.mark.parametrize("like_reference", [False, True])
def test_each_parameter_is_in_one_group(like_reference):
    task = published_task("base_4m", itc=True)
    grouped = [
        name for names in names_by_group(task, settings(decay_like_reference=like_reference)).values() for name in names
    ]
    assert sorted(grouped) == sorted(name for name, _ in task.named_parameters())


def test_frozen_parameters_are_in_no_group():
    task = small_task(ObjectivesConfig(itm=False))
    grouped = {name for names in names_by_group(task, settings()).values() for name in names}
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert grouped == trainable and len(trainable) < len(list(task.parameters()))


def test_each_group_has_its_rate_and_its_decay():
    optim = settings(base_lr=2e-5, fusion_lr_scale=5.0, head_lr_scale=50.0, weight_decay=0.05)
    groups = {group["name"]: group for group in group_parameters(published_task("base_4m"), optim)}
    rates = {"base": 2e-5, "fusion": 1e-4, "head": 1e-3}
    assert len(groups) == 6
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(rates[name.removesuffix("_no_decay")])
        assert group["weight_decay"] == (0.0 if name.endswith("_no_decay") else 0.05)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.vision_tower.vit.transformer.resblocks.0.mlp.c_fc.weight", "base"),
        ("model.vision_tower.vit.positional_embedding", "base"),
        ("model.vision_tower.vit.class_embedding", "base_no_decay"),
        ("model.vision_tower.vit.ln_post.weight", "base_no_decay"),
        ("model.text_tower.encoder.embeddings.word_embeddings.weight", "base"),
        ("model.text_tower.encoder.embeddings.LayerNorm.weight", "base_no_decay"),
        # New parameters that the published code trains at the rate of the towers.
        ("model.modality_embedding.weight", "base"),
        ("model.heads.itc.temperature", "base_no_decay"),
        ("model.text_transform.weight", "fusion"),
        ("model.image_transform.bias", "fusion_no_decay"),
        ("model.cross_modal.text_norm.weight", "fusion_no_decay"),
        ("model.cross_modal.image_bridges.4.norm.bias", "fusion_no_decay"),
        ("model.cross_modal.image_layers.5.cross_attention.value.weight", "fusion"),
        ("model.text_pooler.weight", "fusion"),
        ("model.heads.mlm.decoder.weight", "head"),
        ("model.heads.mlm.bias", "head_no_decay"),
        ("model.heads.mlm.norm.weight", "head_no_decay"),
        ("model.heads.itm.classifier.weight", "head"),
        ("model.heads.itc.image.weight", "head"),
    ],
)
def test_parameter_is_in_the_group_of_its_rate_and_decay(name, group):
    assert name in names_by_group(published_task("base_4m", itc=True), settings())[group]


def test_decay_like_the_reference_adds_clips_vectors_and_the_temperature_and_nothing_else():
    task = published_task("base_4m", itc=True)
    ours, theirs = (names_by_group(task, settings(decay_like_reference=switch)) for switch in (False, True))
    # Reference_spec 3.1 and trap 9. Biases are never decayed.
    norms = {f"resblocks.{layer}.ln_{number}" for layer in range(12) for number in (1, 2)}
    expected = {f"model.vision_tower.vit.transformer.{norm}.weight" for norm in norms}
    expected |= {f"model.vision_tower.vit.{name}" for name in ("ln_pre.weight", "ln_post.weight", "class_embedding")}
    assert set(theirs["base"]) - set(ours["base"]) == expected | {"model.heads.itc.temperature"}
    for name in ("head", "head_no_decay", "fusion", "fusion_no_decay"):
        assert ours[name] == theirs[name]


def test_rate_rises_linearly_from_zero_and_falls_linearly_to_zero():
    optim = settings(total_steps=100, warmup_fraction=0.1)
    assert compute_lr_factor(0, optim) == 0  # as published, the first step changes nothing
    assert compute_lr_factor(5, optim) == 0.5
    assert compute_lr_factor(10, optim) == 1
    assert compute_lr_factor(55, optim) == 0.5
    assert compute_lr_factor(99, optim) == pytest.approx(1 / 90)
    assert compute_lr_factor(100, optim) == compute_lr_factor(101, optim) == 0
    changes = [after - before for before, after in pairwise(compute_lr_factor(step, optim) for step in range(101))]
    assert changes[:10] == pytest.approx([1 / 10] * 10) and changes[10:] == pytest.approx([-1 / 90] * 90)


def test_published_rate_peaks_after_ten_thousand_steps():
    assert max(range(0, 100_001, 100), key=lambda step: compute_lr_factor(step, settings())) == 10_000


@pytest.mark.parametrize(("total", "fraction"), [(1, 0.1), (9, 0.1), (5, 0.0)])
def test_run_too_short_for_a_warmup_starts_at_its_peak(total, fraction):
    assert compute_lr_factor(0, settings(total_steps=total, warmup_fraction=fraction)) == 1


def test_schedule_keeps_the_ratios_between_groups_at_every_step():
    optim = settings(total_steps=12, warmup_fraction=0.25, fusion_lr_scale=5.0, head_lr_scale=50.0)
    optimizer = build_optimizer(group_parameters(small_task(), optim), optim, CPU)
    scheduler = build_schedule(optim)(optimizer)
    for step in range(13):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        base = 1e-5 * compute_lr_factor(step, optim)
        assert rates["base"] == rates["base_no_decay"] == pytest.approx(base)
        assert rates["fusion"] == pytest.approx(5 * base) and rates["head"] == pytest.approx(50 * base)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("setting", "device", "chosen"),
    [
        ("auto", CPU, "torch"),
        ("auto", GPU, "fused"),
        ("torch", GPU, "torch"),
        ("fused", CPU, "fused"),
    ],
)
def test_auto_is_deepspeeds_on_a_gpu_and_torchs_on_a_cpu_and_both_can_be_chosen(setting, device, chosen):
    assert choose_implementation(settings(implementation=setting), device) == chosen


def test_optimizer_is_adamw_with_decoupled_decay_and_the_settings_of_the_run():
    optim = settings(base_lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.95, eps=1e-3)
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = build_optimizer([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}], optim, CPU)
    expected, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.2, 0.7), start=1):
        weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        denominator = (second / (1 - 0.95**step)) ** 0.5 + 1e-3
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * first / (1 - 0.8**step) / denominator
        assert weight.item() == pytest.approx(expected, rel=1e-9)
