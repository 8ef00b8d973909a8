"""Hard negatives: never of the same image, drawn by similarity, and independent of how a batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.objectives.hard_negatives import HardNegatives, hard_negatives

TEMPERATURE = torch.tensor([0.2])


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def draw(image_id: list[int], numbers: Tensor, group: int, rows: slice = slice(None)) -> HardNegatives:
    pairs = len(image_id)
    text, image = unit(pairs, 1), unit(pairs, 2)
    ids = torch.tensor(image_id)
    return hard_negatives(text[rows], image[rows], ids[rows], numbers[rows], TEMPERATURE, group)


def test_a_pair_of_the_same_image_is_never_drawn():
    ids = [4, 4, 5, 6, 7, 7, 7, 8]
    for seed in range(200):
        drawn = draw(ids, torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), 4)
        for row in range(8):
            for other in (int(drawn.image_B[row]), int(drawn.text_B[row])):
                assert ids[other] != ids[row] and other // 4 == row // 4


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_smallest_and_largest_random_numbers_draw_no_pair_of_the_same_image(number):
    ids = [1, 2, 3, 1]
    drawn = draw(ids, torch.full((4, 2), number, dtype=torch.float64), 4)
    assert all(ids[int(other)] != ids[row] for row in range(4) for other in (drawn.image_B[row], drawn.text_B[row]))


def test_negatives_are_drawn_with_the_softmax_of_their_similarity():
    ids, count = [0, 1, 2, 3], 4000
    text, image = unit(4, 1), unit(4, 2)
    expected = (text @ image.T / TEMPERATURE).fill_diagonal_(float("-inf")).softmax(dim=1)
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # evenly spread, so that counts are exact
    counts = np.zeros((4, 4))
    for number in numbers.tolist():
        drawn = draw(ids, torch.full((4, 2), number, dtype=torch.float64), 4)
        counts[np.arange(4), drawn.image_B.numpy()] += 1
    assert np.abs(counts / count - expected.numpy()).max() < 2 / count


def test_negative_texts_are_drawn_by_their_similarity_to_the_image():
    ids, half = [0, 1], torch.full((2, 2), 0.5, dtype=torch.float64)
    assert draw(ids, half, 2).text_B.tolist() == [1, 0]
    text, image = unit(4, 1), unit(4, 2)
    image[2] = text[1]  # equal embeddings: each is the other's hardest negative
    numbers = torch.full((4, 2), 0.5, dtype=torch.float64)
    drawn = hard_negatives(text, image, torch.arange(4), numbers, torch.tensor([0.001]), 4)
    assert int(drawn.image_B[1]) == 2 and int(drawn.text_B[2]) == 1


def test_a_group_of_one_image_has_no_negatives():
    drawn = draw([3, 3, 1, 2], torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 2)
    assert drawn.has_any_B.tolist() == [False, False, True, True]
    assert drawn.image_B.tolist() == [0, 1, 3, 2] and drawn.text_B.tolist() == [0, 1, 3, 2]


def test_half_a_batch_draws_the_negatives_of_the_whole_batch():
    ids = list(range(8))
    numbers = torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole, second = draw(ids, numbers, 4), draw(ids, numbers, 4, slice(4, 8))
    assert torch.equal(whole.image_B[4:], second.image_B + 4) and torch.equal(whole.text_B[4:], second.text_B + 4)
