"""The pretraining step: work that objectives share, the inputs of each objective, and which parameters are trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.config.run import ObjectivesConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from tests.small_models import random_batch, shake, small_config, small_task

COMBINATIONS = [
    ObjectivesConfig(mlm=mlm, itm=itm, itc=itc) for mlm, itm, itc in product((True, False), repeat=3) if mlm or itm
]
# The key bias cancels in the softmax, so its gradient is zero but for rounding.
KEY_BIAS = "key.bias"


def name_of(objectives: ObjectivesConfig) -> str:
    return "+".join(name for name in ("mlm", "itm", "itc") if getattr(objectives, name))


@pytest.mark.parametrize("objectives", COMBINATIONS, ids=name_of)
def test_without_cross_modal_layers_each_trainable_parameter_still_gets_a_gradient(objectives):
    config = small_config()
    config = replace(
        config,
        vision=replace(config.vision, width=40, num_heads=4),
        text=replace(config.text, width=40, num_heads=4),
        fusion=replace(config.fusion, num_layers=0),
    )
    task = PretrainTask(BridgeTower(config, objectives.heads), objectives)
    shake(task)
    task(random_batch())[0].backward()
    trainable = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trainable and [name for name, gradient in trainable.items() if gradient is None] == []


def losses_of(task: PretrainTask) -> dict[str, float]:
    _, metrics = task(random_batch())
    return {name: float(metrics[f"loss/{name}"][0]) for name in ("mlm", "itm", "itc") if f"loss/{name}" in metrics}


@pytest.mark.parametrize("objectives", COMBINATIONS, ids=name_of)
def test_gradient_reaches_each_trainable_parameter(objectives):
    task = small_task(objectives)
    task(random_batch())[0].backward()
    without_gradient = [
        name
        for name, parameter in task.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not (name.endswith(KEY_BIAS) or parameter.grad.count_nonzero()))
    ]
    assert without_gradient == []


@pytest.mark.parametrize("objectives", COMBINATIONS, ids=name_of)
def test_exactly_the_parameters_that_no_loss_reads_are_frozen(objectives):
    task = small_task(objectives)
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    task.requires_grad_(True)
    task(random_batch())[0].backward()
    assert frozen == {name for name, parameter in task.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("objectives", COMBINATIONS, ids=name_of)
def test_loss_is_the_sum_of_the_active_objectives_and_none_depends_on_another(objectives):
    everything = losses_of(small_task())
    task = small_task(objectives)
    # Initial values depend on which heads are drawn before, so copy those of the task with all heads.
    whole = small_task().state_dict()
    task.load_state_dict({name: whole[name] for name in task.state_dict()})
    loss, _ = task(random_batch())
    losses = losses_of(task)
    assert set(losses) == set(name_of(objectives).split("+"))
    assert losses == pytest.approx({name: everything[name] for name in losses}, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(sum(losses.values()), rel=1e-6)


def plain_losses(task: PretrainTask) -> tuple[Tensor, Tensor]:
    """Return the MLM and ITM losses as published: two passes through both towers and the cross-modal encoder."""
    batch, model = random_batch(), task.model
    pixels = model.normalize(batch.pixels_N3SS)
    masked = model(pixels, batch.masked_ids_BL, batch.attention_mask_BL)
    logits = model.mlm_logits(masked)  # at all positions
    labels = torch.full(batch.clean_ids_BL.shape, -100).flatten()
    labels[batch.mlm_index_M] = batch.mlm_label_M
    mlm = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100)
    swapped = model(pixels[batch.itm_image_B], batch.clean_ids_BL, batch.attention_mask_BL)
    itm = F.cross_entropy(model.itm_logits(swapped), batch.itm_label_B)
    return mlm, itm


def test_shared_vision_pass_gives_the_losses_and_gradients_of_two_separate_passes():
    published = ObjectivesConfig(mlm=True, itm=True)
    shared, plain = small_task(published), small_task(published)
    loss, metrics = shared(random_batch())
    loss.backward()
    mlm, itm = plain_losses(plain)
    (mlm + itm).backward()
    assert float(metrics["loss/mlm"][0]) == pytest.approx(float(mlm.detach()), rel=1e-5)
    assert float(metrics["loss/itm"][0]) == pytest.approx(float(itm.detach()), rel=1e-5)
    for (name, one), other in zip(shared.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("objectives", COMBINATIONS, ids=name_of)
def test_each_image_runs_through_the_vision_tower_once_whatever_the_objectives(objectives):
    task = small_task(objectives)
    rows: list[int] = []
    task.model.vision_tower.vit.ln_pre.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    task(random_batch(pairs=6))
    assert rows == [6]


def test_logits_over_the_vocabulary_are_computed_at_masked_positions_only():
    task, batch = small_task(), random_batch()
    rows: list[int] = []
    task.model.mlm_head.transform.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    task(batch)
    assert rows == [len(batch.mlm_index_M)] and rows[0] < batch.clean_ids_BL.numel() / 2


def test_itm_reads_clean_captions_and_mlm_reads_the_true_image():
    task, batch = small_task(), random_batch()
    before = task(batch)[1]
    other_masks = task(batch._replace(masked_ids_BL=(batch.masked_ids_BL + 3) % 45 + 5))[1]
    assert other_masks["loss/mlm"][0] != before["loss/mlm"][0]
    assert other_masks["loss/itm"][0] == pytest.approx(float(before["loss/itm"][0]), rel=1e-6)
    assert other_masks["loss/itc"][0] == pytest.approx(float(before["loss/itc"][0]), rel=1e-6)
    other_negatives = task(batch._replace(itm_image_B=batch.itm_image_B.flip(0)))[1]
    assert other_negatives["loss/itm"][0] != before["loss/itm"][0]
    assert other_negatives["loss/mlm"][0] == pytest.approx(float(before["loss/mlm"][0]), rel=1e-6)


def test_batch_without_a_masked_token_has_a_loss_of_zero_and_gradients_for_all_parameters():
    task = small_task(ObjectivesConfig(mlm=True, itm=False))
    none = torch.zeros(0, dtype=torch.long)
    batch = random_batch()._replace(
        mlm_index_M=none, mlm_label_M=none, mlm_weight_M=torch.zeros(0), num_masked=(0,) * 4
    )
    loss, metrics = task(batch)
    loss.backward()
    assert float(loss.detach()) == 0 and metrics["accuracy/mlm"].tolist() == [0, 0]
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)


@torch.no_grad()
def test_evaluation_computes_the_scores_of_the_training_step():
    task, batch = small_task().eval(), random_batch()
    pixels, mask = task.model.normalize(batch.pixels_N3SS), batch.attention_mask_BL
    image, text = task.image_features(batch.pixels_N3SS), task.text_features(batch.clean_ids_BL, mask)
    logits = task.model.itm_logits(task.model(pixels, batch.clean_ids_BL, mask))
    rows = torch.arange(4)
    torch.testing.assert_close(task.match_logits(text.states_KBND, mask, image.states_KBND, rows), logits)
    masked = task.text_features(batch.masked_ids_BL, mask)
    words = task.masked_logits(masked.states_KBND, mask, image.states_KBND, rows, batch.mlm_index_M)
    loss = (F.cross_entropy(words, batch.mlm_label_M, reduction="none") * batch.mlm_weight_M).sum()
    assert float(loss) == pytest.approx(float(task(batch)[1]["loss/mlm"][0]), rel=1e-5)
    assert image.embedding_BC is not None and text.embedding_BC is not None
    torch.testing.assert_close(image.embedding_BC.norm(dim=-1), torch.ones(4))
    assert task.contrast_temperature() == pytest.approx(0.07)


@torch.no_grad()
def test_match_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16():
    task, batch = small_task().to(torch.bfloat16).eval(), random_batch()
    mask = batch.attention_mask_BL
    image, text = task.image_features(batch.pixels_N3SS), task.text_features(batch.clean_ids_BL, mask)
    logits = task.match_logits(text.states_KBND, mask, image.states_KBND, torch.arange(4))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.to(torch.bfloat16).float())


@torch.no_grad()
def test_without_contrast_there_are_no_embeddings():
    task = small_task(ObjectivesConfig()).eval()
    assert task.image_features(random_batch().pixels_N3SS).embedding_BC is None


@torch.no_grad()
def test_word_attention_is_laid_out_as_the_patches_of_the_image():
    task = small_task().eval()
    batch = random_batch()
    mask = batch.attention_mask_BL
    text, image = task.text_features(batch.clean_ids_BL, mask), task.image_features(batch.pixels_N3SS)
    probability_RLYX = task.word_attention(text.states_KBND, mask, image.states_KBND)
    assert probability_RLYX is not None and probability_RLYX.shape == (*mask.shape, 3, 3)  # 24 px in patches of 8
    maps = task.model.fuse(text.states_KBND, image.states_KBND, mask, return_attention=True).attention
    assert maps is not None
    last_RLP = maps.text_to_image[-1].mean(dim=1)
    for row, column in product(range(3), range(3)):
        # Position 0 is the class token.
        assert torch.equal(probability_RLYX[..., row, column], last_RLP[..., 1 + 3 * row + column])
    assert (probability_RLYX.sum(dim=(-2, -1)) + last_RLP[..., 0] - 1).abs().max() < 1e-5
