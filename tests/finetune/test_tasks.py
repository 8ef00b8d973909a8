"""The tasks' losses against a plain forward pass, which computes every pair alone and whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.batch import FinetuneBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.hard_negatives import hard_negatives
from finetune.tasks import ClassifierTask, RetrievalTask
from tests.small_models import random_texts, shake, small_config

PAIRS, ANSWERS = 6, 7
CLASSES = {"vqa": ANSWERS, "snli_ve": 3, "nlvr2": 2, "retrieval": 0}


def make_model(*heads: str) -> BridgeTower:
    config = small_config()
    model = BridgeTower(
        dataclasses.replace(config, heads=dataclasses.replace(config.heads, num_answers=ANSWERS)), heads
    )
    shake(model)
    if "itc" in heads:
        torch.nn.init.constant_(model.itc_head.temperature, 0.2)
    return model.eval()


def make_batch(task: str, *, images: int = PAIRS) -> FinetuneBatch:
    rng = torch.Generator().manual_seed(2)
    ids, mask = random_texts(PAIRS, 8)
    classes = CLASSES[task]
    label = torch.randint(0, max(classes, 1), (PAIRS,), generator=rng)
    target = F.one_hot(label, classes).float() if classes else torch.zeros(PAIRS, 0)
    rows = images * (2 if task == "nlvr2" else 1)
    return FinetuneBatch(
        pixels_N3SS=torch.randint(0, 256, (rows, 3, 24, 24), generator=rng, dtype=torch.uint8),
        ids_BL=ids,
        attention_mask_BL=mask,
        image_B=torch.arange(PAIRS) * images // PAIRS,
        target_BC=target * (0.3 if task == "vqa" else 1.0),
        image_id_B=torch.tensor([1, 2, 2, 3, 4, 5]),
        draw_B2=torch.rand(PAIRS, 2, dtype=torch.float64, generator=rng),
        replaced_B=torch.zeros(PAIRS, dtype=torch.bool),
    )


def pooled_alone(model: BridgeTower, batch: FinetuneBatch, text: int, image: int, row: int = 1) -> Tensor:
    """Return the pooled pair of one text, without padding, and one image."""
    length = int(batch.attention_mask_BL[text].sum())
    ids, mask = batch.ids_BL[text : text + 1, :length], batch.attention_mask_BL[text : text + 1, :length]
    pixels = model.normalize(batch.pixels_N3SS[image : image + 1])
    encoded = model.encode_text(ids, mask), model.encode_image(pixels, row)
    return model.fuse(encoded[0].states_KBND, encoded[1].states_KBND, mask).pooled


@pytest.mark.parametrize("images", [PAIRS, 3], ids=["an image each", "shared images"])
@pytest.mark.parametrize("task", ["vqa", "snli_ve"])
@torch.no_grad()
def test_logits_equal_the_head_on_each_pair_alone(task, images):
    model, batch = make_model(task), make_batch(task, images=images)
    logits = ClassifierTask(model, task).eval().logits(batch)
    alone = [model.heads[task](pooled_alone(model, batch, n, int(batch.image_B[n]))) for n in range(PAIRS)]
    assert logits.shape == (PAIRS, CLASSES[task])
    assert torch.allclose(logits, torch.cat(alone), atol=2e-5)


@pytest.mark.parametrize("images", [PAIRS, 3], ids=["two images each", "shared images"])
@torch.no_grad()
def test_nlvr2_reads_both_pooled_pairs_and_the_second_image_has_its_own_modality_row(images):
    model, batch = make_model("nlvr2"), make_batch("nlvr2", images=images)
    assert not torch.equal(model.modality_embedding.weight[1], model.modality_embedding.weight[2])
    logits = ClassifierTask(model, "nlvr2").eval().logits(batch)
    for n in range(PAIRS):
        image = int(batch.image_B[n])
        both = [pooled_alone(model, batch, n, image + side * images, 1 + side) for side in (0, 1)]
        assert torch.allclose(logits[n], model.heads["nlvr2"](torch.cat(both, dim=1))[0], atol=2e-5)
        swapped = model.heads["nlvr2"](torch.cat(both[::-1], dim=1))[0]
        assert not torch.allclose(logits[n], swapped, atol=1e-3)


@torch.no_grad()
def test_retrieval_is_contrast_and_matching_of_true_pairs_and_two_hard_negatives_each():
    model, batch = make_model("itm", "itc"), make_batch("retrieval")
    task = RetrievalTask(model, 3).eval()
    contrast, matching = task.results(batch)
    head, pixels = model.itc_head, model.normalize(batch.pixels_N3SS)
    text = F.normalize(head.text(model.encode_text(batch.ids_BL, batch.attention_mask_BL).class_BD), dim=1)
    image = F.normalize(head.image(model.encode_image(pixels).class_BD), dim=1)
    target = (batch.image_id_B[:, None] == batch.image_id_B[None]).float()
    target = target / target.sum(dim=1, keepdim=True)
    logits = image @ text.T / 0.2
    expected = (
        -(target * logits.log_softmax(1)).sum(1).mean() / 2 - (target * logits.T.log_softmax(1)).sum(1).mean() / 2
    )
    assert contrast.loss.item() == pytest.approx(expected.item(), rel=1e-4)

    wrong = hard_negatives(text, image, batch.image_id_B, batch.draw_B2, torch.tensor([0.2]), 3)
    rows = [(n, n, 1) for n in range(PAIRS)]
    rows += [(n, int(wrong.image_B[n]), 0) for n in range(PAIRS)] + [(int(wrong.text_B[n]), n, 0) for n in range(PAIRS)]
    scores = torch.cat([model.itm_head(pooled_alone(model, batch, text, image)) for text, image, _ in rows])
    labels = torch.tensor([label for *_, label in rows])
    assert labels.float().mean() == pytest.approx(1 / 3)
    assert matching.loss.item() == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-4)
    total, metrics = task(batch)
    assert total.item() == pytest.approx(contrast.loss.item() + matching.loss.item())
    assert {"loss/itc", "loss/itm", "accuracy/itc", "accuracy/itm", "tokens_per_pair"} <= metrics.keys()


@torch.no_grad()
def test_in_a_group_with_a_single_image_no_pair_counts_as_wrong():
    model, batch = make_model("itm", "itc"), make_batch("retrieval")
    batch = batch._replace(image_id_B=torch.zeros(PAIRS, dtype=torch.long))
    _, matching = RetrievalTask(model, 3).eval().results(batch)
    own = torch.cat([model.itm_head(pooled_alone(model, batch, n, n)) for n in range(PAIRS)])
    everything_matches = F.cross_entropy(own, torch.ones(PAIRS, dtype=torch.long)).item()
    assert matching.loss.item() == pytest.approx(everything_matches, rel=1e-4)


@pytest.mark.parametrize("task", ["vqa", "snli_ve", "nlvr2"])
def test_every_parameter_of_a_task_is_trained(task):
    model = ClassifierTask(make_model(task), task).train()
    model(make_batch(task))[0].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_every_parameter_of_retrieval_is_trained():
    model = RetrievalTask(make_model("itm", "itc"), 3).train()
    model(make_batch("retrieval"))[0].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
