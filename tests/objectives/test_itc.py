"""Image-text contrast over the pairs of all ranks, with every caption of an image as a positive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bridgetower.config.model import HeadsConfig, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.model.heads import MAX_TEMPERATURE, MIN_TEMPERATURE, ITCHead
from bridgetower.objectives.itc import image_text_contrast
from tests.ranks import run_on_ranks

# No model is built here, since every rank below would import its libraries.
WIDTH, TEMPERATURE = 12, 0.07
CONFIG = ModelConfig(
    vision=VisionTowerConfig(width=48, num_heads=3),
    text=TextTowerConfig(width=32, num_heads=2),
    heads=HeadsConfig(itc_width=WIDTH),
)


class Contrast(nn.Module):
    """The ITC head, and the loss of its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.head = ITCHead(CONFIG)

    def forward(self, text, image, image_id):
        head = self.head
        return image_text_contrast(head.embed_text(text), head.embed_image(image), image_id, head.clamped_temperature())


def make_objective(temperature: float = TEMPERATURE) -> Contrast:
    objective = Contrast()
    nn.init.constant_(objective.head.temperature, temperature)
    rng = torch.Generator().manual_seed(0)
    for linear in (objective.head.text, objective.head.image):
        for parameter in linear.parameters():
            torch.nn.init.normal_(parameter, std=0.15, generator=rng)
    return objective


def features(pairs: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(pairs, CONFIG.text.width, generator=rng)
    return text, torch.randn(pairs, CONFIG.vision.width, generator=rng)


def similarities(objective):
    """Return the cosine of each text with each image, from the weights of the head, in float64."""
    text, image = features()
    heads = objective.head
    text = text.double() @ heads.text.weight.double().T + heads.text.bias.double()
    image = image.double() @ heads.image.weight.double().T + heads.image.bias.double()
    return (text / text.norm(dim=1, keepdim=True)) @ (image / image.norm(dim=1, keepdim=True)).T


def written_out_loss(objective, image_ids):
    """Return the mean cross-entropy of all texts and images; pairs of the same image are equally good answers."""
    odds_TI = torch.exp(similarities(objective) / objective.head.temperature.double())
    losses = []
    for row in range(6):
        positives = [other for other in range(6) if image_ids[other] == image_ids[row]]
        for odds in (odds_TI[row], odds_TI[:, row]):
            losses.append(torch.stack([-torch.log(odds[other] / odds.sum()) for other in positives]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "image_ids",
    [[0, 1, 2, 3, 4, 5], [7, 7, 2, 3, 7, 5], [4, 4, 4, 4, 4, 4]],
    ids=["all differ", "some are the same", "all are the same"],
)
def test_loss_and_gradients_are_those_of_cross_entropy_in_both_directions_with_every_positive(image_ids):
    objective, plain = make_objective(), make_objective()
    loss, expected = objective(*features(), torch.tensor(image_ids)).loss, written_out_loss(plain, image_ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for one, other in zip(objective.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_accuracy_counts_images_whose_top_caption_is_one_of_theirs():
    objective = make_objective()
    best = similarities(objective).argmax(dim=0).tolist()
    for image_ids in ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]):
        right = sum(image_ids[best[row]] == image_ids[row] for row in range(6))
        metrics = objective(*features(), torch.tensor(image_ids)).metrics
        assert metrics["accuracy/itc"].tolist() == [right, 6]
        assert metrics["temperature"].tolist() == pytest.approx([TEMPERATURE, 1])


@pytest.mark.parametrize(("stored", "used"), [(0.9, MAX_TEMPERATURE), (0.0001, MIN_TEMPERATURE), (0.07, 0.07)])
def test_temperature_is_clamped_where_it_is_used_and_its_gradient_passes(stored, used):
    head = make_objective(stored).head
    clamped = head.clamped_temperature()
    assert clamped.item() == pytest.approx(used, rel=1e-4)
    (3 * clamped).sum().backward()
    assert head.temperature.grad is not None and head.temperature.grad.tolist() == [3.0]


@pytest.mark.parametrize("stored", [0.9, 0.0001])
def test_temperature_beyond_its_bounds_still_learns(stored):
    objective = make_objective(stored)
    objective(*features(), torch.arange(6)).loss.backward()
    gradient = objective.head.temperature.grad
    assert gradient is not None and gradient.item() != 0


def test_published_bounds_of_the_temperature():
    # Reference_spec 1.7: clamped in place to [0.001, 0.5].
    assert (MIN_TEMPERATURE, MAX_TEMPERATURE) == (0.001, 0.5)


@torch.no_grad()
def test_embeddings_are_unit_vectors_in_float32_also_under_bfloat16():
    head = make_objective().head.bfloat16()
    text, image = features()
    for embedded in (head.embed_text(text.bfloat16()), head.embed_image(image.bfloat16())):
        assert embedded.dtype == torch.float32
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(6))


# Two ranks with three pairs each against one process with all six; pairs 1 and 4 show the same image.

IMAGE_IDS = torch.tensor([10, 11, 12, 13, 11, 15])


def loss_and_gradients(rows):
    objective = make_objective()
    text, image = (states[rows].clone().requires_grad_() for states in features())
    result = objective(text, image, IMAGE_IDS[rows])
    result.loss.backward()
    weights = {name: parameter.grad for name, parameter in objective.named_parameters()}
    metrics = {name: value.double() for name, value in result.metrics.items()}
    return {"loss": result.loss.detach(), "text": text.grad, "image": image.grad, "weights": weights, **metrics}


def on_each_rank(rank: int, folder: Path) -> None:
    torch.save(loss_and_gradients(slice(3 * rank, 3 * rank + 3)), folder / f"{rank}.pt")


def test_two_ranks_equal_one_process_with_all_pairs_in_loss_accuracy_and_every_gradient(tmp_path):
    run_on_ranks(on_each_rank, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    joined = loss_and_gradients(slice(None))
    # As DeepSpeed does, take the mean over ranks of every gradient.
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, joined["loss"], rtol=1e-5, atol=1e-6)
    assert torch.equal(first["accuracy/itc"] + second["accuracy/itc"], joined["accuracy/itc"])
    for name, gradient in joined["weights"].items():
        torch.testing.assert_close(
            (first["weights"][name] + second["weights"][name]) / 2, gradient, rtol=1e-5, atol=1e-6
        )
    for name in ("text", "image"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]) / 2, joined[name], rtol=1e-5, atol=1e-6)
    # The other rank's pairs do change the loss.
    assert float(F.mse_loss(first["loss"], joined["loss"])) > 1e-4
