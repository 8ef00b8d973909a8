"""The fast path has the losses and gradients of the model in plain torch (``bridgetower/model/plain.py``)."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from bridgetower.batch import PretrainBatch
from bridgetower.config.model import BridgeForm, ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.plain import PlainBridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from tests.conftest import REPO
from tests.small_models import EVERY_OBJECTIVE, random_batch, shake, small_config, small_task

Losses = dict[str, float]
Gradients = dict[str, Tensor]


def plain_model(task: PretrainTask) -> PlainBridgeTower:
    """Return the plain model with the weights and the mode of a task."""
    weight = task.model.text_pooler.weight
    plain = PlainBridgeTower(task.model.config, task.objectives.heads).to(weight.device, weight.dtype)
    plain.load_state_dict(task.model.state_dict(), strict=True)
    return plain.train(task.training)


def plain_step(task: PretrainTask, batch: PretrainBatch) -> tuple[Losses, Gradients]:
    """Return losses and gradients of the plain model, under the task's names."""
    plain = plain_model(task)
    losses = plain.losses(task.model.normalize(batch.pixels_N3SS), batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {f"model.{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return {f"loss/{name}": float(loss.detach()) for name, loss in losses.items()}, gradients


def fast_step(task: PretrainTask, batch: PretrainBatch) -> tuple[Losses, Gradients]:
    """Return losses and gradients of the task."""
    task.zero_grad()
    loss, metrics = task(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return {name: float(value[0]) for name, value in metrics.items() if name.startswith("loss/")}, gradients


def assert_agrees_with_plain(task: PretrainTask, batch: PretrainBatch, recompute: tuple[str, ...] = ()) -> None:
    """Compare the task with the plain model: losses to 1e-5, gradients to 1e-4 of their norm."""
    losses, gradients = plain_step(task, batch)
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    task.model.recompute = recompute
    fast_losses, fast_gradients = fast_step(task, batch)
    task.model.recompute = ()
    assert fast_losses == pytest.approx(losses, abs=1e-5)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    # Parameters that no loss reads have no gradient on the fast path, and zeros or none in the plain model.
    unused = gradients.keys() - fast_gradients.keys()
    assert fast_gradients.keys() <= gradients.keys() and fast_gradients.keys() == gradients.keys() & trained, unused
    assert all(float(gradients[name].norm()) == 0 for name in unused & trained)
    for name, gradient in fast_gradients.items():
        if name.endswith("key.bias"):  # it cancels in the softmax, so its gradient is zero but for rounding
            assert max(float(gradient.norm()), float(gradients[name].norm())) < 1e-6 * scale, name
            continue
        error = float((gradient - gradients[name]).norm()) / (float(gradients[name].norm()) + 1e-5 * scale)
        assert error < 1e-4, name


def with_masks(batch: PretrainBatch, counts: list[int]) -> PretrainBatch:
    """Return the batch with the given number of masked tokens in each caption."""
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


SIZES = (1, 2, 7, 32)
BATCHES = {f"{pairs} pairs": random_batch(pairs, seed=pairs) for pairs in SIZES}
BATCHES |= {
    f"{pairs} pairs, every other one without a masked token": with_masks(
        random_batch(pairs, seed=pairs), [n % 2 for n in range(pairs)]
    )
    for pairs in SIZES
}
BATCHES["no masked token at all"] = with_masks(random_batch(7), [0] * 7)
BATCHES["captions without a masked token"] = with_masks(random_batch(7), [0, 2, 0, 1, 1, 0, 1])
BATCHES["one masked token"] = with_masks(random_batch(7), [0, 0, 0, 1, 0, 0, 0])
# Some images serve only as negatives, as with data.itm_negatives=corpus.
BATCHES["negatives of the corpus"] = random_batch(4)._replace(
    pixels_N3SS=random_batch(8).pixels_N3SS, itm_image_B=torch.tensor([0, 4, 7, 3])
)
EVERY_PART = ("vision", "text", "fusion")


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("objectives", [EVERY_OBJECTIVE, ObjectivesConfig()], ids=["with ITC", "published"])
def test_losses_and_gradients_are_those_of_the_plain_model(name, objectives):
    task = small_task(objectives)
    assert_agrees_with_plain(task, BATCHES[name])
    assert_agrees_with_plain(task, BATCHES[name], EVERY_PART)


@pytest.mark.parametrize(
    "objectives",
    [
        ObjectivesConfig(itm=False),
        ObjectivesConfig(mlm=False),
        ObjectivesConfig(itm=False, itc=True),
        ObjectivesConfig(mlm=False, itc=True),
    ],
    ids=["MLM", "ITM", "MLM and ITC", "ITM and ITC"],
)
def test_fewer_objectives_agree(objectives):
    assert_agrees_with_plain(small_task(objectives), BATCHES["7 pairs"])
    assert_agrees_with_plain(small_task(objectives), BATCHES["7 pairs"], EVERY_PART)


def variants() -> dict[str, ModelConfig]:
    """Return a configuration for every bridge form and for every other setting that changes the forward pass."""
    config = small_config(dropout=0.0)
    fusion = config.fusion
    changes: dict[str, dict[str, Any]] = {
        **{form: {"bridge": form} for form in get_args(BridgeForm)},
        "cross_attention, padding seen": {"bridge": "cross_attention", "bridge_masks_padding": False},
        "cross_attention_ffn, padding seen": {"bridge": "cross_attention_ffn", "bridge_masks_padding": False},
        "one layer": {"num_layers": 1},
        "one external": {"num_external_layers": 1},
        "METER": {"num_external_layers": fusion.num_layers},
        "METER with multi-layer fusion": {"num_external_layers": fusion.num_layers, "multi_layer_fusion": True},
    }
    configs = {
        name: dataclasses.replace(config, fusion=dataclasses.replace(fusion, **change))
        for name, change in changes.items()
    }
    text = dataclasses.replace(config.text, width=40, num_heads=2)
    vision = dataclasses.replace(config.vision, width=40, num_heads=2)
    no_layer = dataclasses.replace(fusion, num_layers=0)
    configs["no cross-modal layer"] = dataclasses.replace(config, text=text, vision=vision, fusion=no_layer)
    tied = dataclasses.replace(config.heads, mlm_tied=True)
    configs["tied decoder"] = dataclasses.replace(config, text=text, heads=tied)
    gelu = dataclasses.replace(config.vision, activation="gelu")
    configs["GELU in the vision tower"] = dataclasses.replace(config, vision=gelu)
    return configs


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("pairs", SIZES)
def test_every_form_of_the_model_agrees(name, pairs):
    task = PretrainTask(BridgeTower(variants()[name], EVERY_OBJECTIVE.heads), EVERY_OBJECTIVE)
    shake(task)
    nn.init.constant_(task.model.itc_head.temperature, 0.07)
    task.double().train()  # float64, so that small gradients exceed rounding
    assert_agrees_with_plain(task, BATCHES[f"{pairs} pairs"])
    assert_agrees_with_plain(task, BATCHES[f"{pairs} pairs, every other one without a masked token"], EVERY_PART)


def dropped_losses(step, draws: int) -> Tensor:
    """Return the MLM and ITM losses of several steps, each with its own dropout, shape (draws, 2)."""
    losses = []
    for seed in range(draws):
        torch.manual_seed(seed)
        losses.append(step())
    return torch.tensor(losses)


@torch.no_grad()
def test_with_dropout_the_losses_have_the_same_distribution():
    task, draws, batch = small_task(ObjectivesConfig(), dropout=0.3), 120, BATCHES["7 pairs"]
    reference = plain_model(task)
    pixels = task.model.normalize(batch.pixels_N3SS)
    plain = dropped_losses(lambda: [float(loss) for loss in reference.losses(pixels, batch).values()], draws)
    fast = dropped_losses(lambda: [float(task(batch)[1][f"loss/{name}"][0]) for name in ("mlm", "itm")], draws)
    spread = plain.std(dim=0)
    # Means agree within four standard errors, and standard deviations within a quarter.
    assert ((fast.mean(dim=0) - plain.mean(dim=0)).abs() < 4 * spread * (2 / draws) ** 0.5).all()
    assert (fast.std(dim=0) / spread).tolist() == pytest.approx([1, 1], abs=0.25)


def test_plain_model_is_shorter_than_350_lines():
    lines = (REPO / "bridgetower/model/plain.py").read_text().splitlines()
    assert len(lines) < 350
