"""The step that saves work against the plain one: the same losses and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.errors import ConfigError
from bridgetower.kernels.compiled import compile_parts
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.step.plan import plan_rows
from bridgetower.tasks.pretraining import PretrainTask
from tests.small_models import EVERY_OBJECTIVE, random_batch, shake, small_config, small_task

SWITCHES = sorted(name for name, value in vars(PLAIN).items() if value is False and name != "compile")
EVERYTHING = ComputeConfig()
RECOMPUTED = ComputeConfig(recompute=("vision", "text", "fusion"))
BATCHES = {f"{pairs} pairs": random_batch(pairs, seed=pairs) for pairs in (1, 2, 7, 32)}


def with_masks(batch: PretrainBatch, counts: list[int]) -> PretrainBatch:
    """So many masked tokens in each caption."""
    length = batch.clean_ids_BL.shape[1]
    index = torch.tensor(
        [row * length + 1 + n for row, count in enumerate(counts) for n in range(count)], dtype=torch.int64
    )
    masked = batch.clean_ids_BL.clone()
    masked.view(-1)[index] = 4
    return batch._replace(
        masked_ids_BL=masked,
        mlm_index_M=index,
        mlm_label_M=batch.clean_ids_BL.view(-1)[index],
        mlm_weight_M=torch.rand(len(index), generator=torch.Generator().manual_seed(0)),
        num_masked=tuple(counts),
    )


BATCHES |= {
    f"{pairs} pairs, every other one without a masked token": with_masks(
        random_batch(pairs, seed=pairs), [n % 2 for n in range(pairs)]
    )
    for pairs in (1, 2, 7, 32)
}
BATCHES["no masked token at all"] = with_masks(random_batch(7), [0] * 7)
BATCHES["captions without a masked token"] = with_masks(random_batch(7), [0, 2, 0, 1, 1, 0, 1])
BATCHES["one masked token"] = with_masks(random_batch(7), [0, 0, 0, 1, 0, 0, 0])
# Images that are there as negatives alone, as data.itm_negatives=corpus has them.
BATCHES["negatives of the corpus"] = random_batch(4)._replace(
    pixels_N3SS=random_batch(8).pixels_N3SS, itm_image_B=torch.tensor([0, 4, 7, 3])
)


def computed(
    task: PretrainTask, batch: PretrainBatch, compute: ComputeConfig
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses by name, and gradients."""
    task.zero_grad()
    task.model.compute = compute
    loss, metrics = task(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return {name: float(value[0]) for name, value in metrics.items() if name.startswith("loss/")}, gradients


def assert_agree(task: PretrainTask, batch: PretrainBatch, *computes: ComputeConfig) -> None:
    losses, gradients = computed(task, batch, PLAIN)
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for compute in computes:
        found, other = computed(task, batch, compute)
        assert found == pytest.approx(losses, abs=1e-5)
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            if name.endswith("key.bias"):  # has no effect, so that its gradient is nothing but rounding
                assert max(float(gradient.norm()), float(other[name].norm())) < 1e-6 * scale, name
                continue
            error = float((other[name] - gradient).norm()) / (float(gradient.norm()) + 1e-5 * scale)
            assert error < 1e-4, name


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("objectives", [EVERY_OBJECTIVE, ObjectivesConfig()], ids=["with ITC", "published"])
def test_all_savings_together_change_no_loss_and_no_gradient(kind, objectives):
    assert_agree(small_task(objectives), BATCHES[kind], EVERYTHING, RECOMPUTED)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_saving_alone_and_each_left_out_changes_nothing(switch):
    alone, left_out = (
        ComputeConfig(**{**vars(compute), switch: value}) for compute, value in ((PLAIN, True), (EVERYTHING, False))
    )
    task = small_task()
    for kind in ("7 pairs", "captions without a masked token", "negatives of the corpus"):
        assert_agree(task, BATCHES[kind], alone, left_out)


@pytest.mark.parametrize("objectives", [ObjectivesConfig(itm=False), ObjectivesConfig(mlm=False)], ids=["MLM", "ITM"])
def test_one_objective_alone_agrees(objectives):
    assert_agree(small_task(objectives), BATCHES["7 pairs"], EVERYTHING, RECOMPUTED)


def variants() -> dict[str, ModelConfig]:
    config = small_config(dropout=0.0)
    fusion = config.fusion
    changes: dict[str, dict[str, Any]] = {
        **{form: {"bridge": form} for form in ("gated_interpolate", "cross_attention", "cross_attention_ffn")},
        "cross_attention, padding seen": {"bridge": "cross_attention", "bridge_masks_padding": False},
        "cross_attention_ffn, padding seen": {"bridge": "cross_attention_ffn", "bridge_masks_padding": False},
        "one layer": {"num_layers": 1},
        "one external": {"num_external_layers": 1},
        "METER": {"num_external_layers": fusion.num_layers, "multi_layer_fusion": True},
    }
    return {
        name: dataclasses.replace(config, fusion=dataclasses.replace(fusion, **change))
        for name, change in changes.items()
    }


@pytest.mark.parametrize("name", variants())
def test_variants_of_the_model_agree(name):
    task = PretrainTask(BridgeTower(variants()[name], EVERY_OBJECTIVE.heads), EVERY_OBJECTIVE)
    shake(task)
    nn.init.constant_(task.model.itc_head.temperature, 0.07)
    assert_agree(task.train(), BATCHES["7 pairs"], EVERYTHING, RECOMPUTED)


def test_nothing_is_computed_for_padding():
    batch = random_batch(7)
    rows = plan_rows(batch, ObjectivesConfig(), EVERYTHING)
    assert len(rows.ids_T) == 2 * sum(batch.num_tokens) < 2 * batch.clean_ids_BL.numel()
    assert (rows.ids_T != 1).all()
    lengths = torch.tensor(batch.num_tokens)[rows.order_B]
    assert lengths.tolist() == sorted(batch.num_tokens)
    texts = rows.ids_T[: sum(batch.num_tokens)].split(lengths.tolist())
    for pair, text in zip(rows.order_B.tolist(), texts, strict=True):
        assert text.tolist() == batch.clean_ids_BL[pair, : batch.num_tokens[pair]].tolist()


def dropped(task: PretrainTask, compute: ComputeConfig, draws: int) -> Tensor:
    """Losses with dropout, drawn anew each time."""
    task.model.compute = compute
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        metrics = task(BATCHES["7 pairs"])[1]
        found.append(torch.stack([metrics["loss/mlm"][0], metrics["loss/itm"][0]]))
    return torch.stack(found)


@torch.no_grad()
def test_with_dropout_the_losses_have_the_same_distribution():
    task, draws = small_task(ObjectivesConfig(), dropout=0.3), 120
    plain, saving = dropped(task, PLAIN, draws), dropped(task, EVERYTHING, draws)
    spread = plain.std(dim=0)
    # Means within four standard errors; spreads and the correlation of the two losses alike.
    assert ((saving.mean(dim=0) - plain.mean(dim=0)).abs() < 4 * spread * (2 / draws) ** 0.5).all()
    assert (saving.std(dim=0) / spread).tolist() == pytest.approx([1, 1], abs=0.25)


# Inductor's own kernels, which take a minute to build, are run by benchmarks/step.py.
def test_compiled_parts_agree_and_are_compiled_once_for_captions_of_any_length():
    task = small_task(ObjectivesConfig())
    kinds = ("7 pairs", "captions without a masked token")
    expected = [computed(task, BATCHES[kind], EVERYTHING) for kind in kinds]
    names = list(task.state_dict())
    compile_parts(task.model, backend="aot_eager")
    for kind, (losses, gradients) in zip(kinds, expected, strict=True):
        found, other = computed(task, BATCHES[kind], EVERYTHING)
        assert found == pytest.approx(losses, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
    assert list(task.state_dict()) == names
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):  # other lengths, other numbers of masked tokens
            computed(task, random_batch(7, seed=100 + seed), EVERYTHING)


def step_flops(task: PretrainTask) -> int:
    with FlopCounterMode(display=False) as counter:
        task(BATCHES["7 pairs"])[0].backward()
    return int(counter.get_total_flops())


def test_frozen_layers_are_not_trained_and_cost_no_backward_pass():
    task = small_task(ObjectivesConfig())
    flops = [step_flops(task)]
    for vision, text in ((2, 1), (4, 3), (-1, -1)):
        freeze_layers(task.model, vision=vision, text=text)
        task.zero_grad(set_to_none=True)
        flops.append(step_flops(task))
        frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
        assert all(parameter.grad is None for parameter in task.parameters() if not parameter.requires_grad)
        assert any("conv1" in name for name in frozen) and any("word_embeddings" in name for name in frozen)
        assert any("resblocks.1." in name for name in frozen) and any("layer.0." in name for name in frozen)
        assert any("ln_post" in name for name in frozen) == (vision == -1)
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4
    assert all("tower" in name for name in frozen)


def test_more_frozen_layers_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.frozen_text_layers=9, but the text tower has \d layers.*-1 for"):
        freeze_layers(small_task().model, vision=0, text=9)
