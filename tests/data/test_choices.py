"""Masks and negatives have the published rates and depend only on seed and position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower import rng
from bridgetower.data import choices
from bridgetower.data.text import Tokenizer, pad

SAME_EVERY_TIME = settings(derandomize=True, deadline=None)
STREAM = rng.key(0, "mlm")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("roberta")


@pytest.fixture(scope="module")
def many(tokenizer) -> tuple[np.ndarray, choices.MaskedTokens]:
    """400,000 ordinary tokens between start and end tokens, clean and masked."""
    ids_BL = 1000 + rng.below(1, np.arange(20_000 * 22).reshape(20_000, 22), 40_000)
    ids_BL[:, 0], ids_BL[:, -1] = tokenizer.start_id, tokenizer.end_id
    return ids_BL, mask(ids_BL, np.arange(20_000), tokenizer)


def mask(ids_BL, counters, tokenizer, stream=STREAM) -> choices.MaskedTokens:
    return choices.mask_tokens(ids_BL, np.asarray(counters), tokenizer, stream=stream, probability=0.15)


def test_15_percent_of_the_ordinary_tokens_are_predicted(many):
    _, masked = many
    # The standard deviation is 0.06 percent.
    assert len(masked.index_M) / 400_000 == pytest.approx(0.15, abs=0.003)


def test_80_percent_of_predicted_tokens_become_mask_10_a_random_token_and_10_stay(many, tokenizer):
    _, masked = many
    shown_M = masked.ids_BL.ravel()[masked.index_M]
    is_mask, is_kept = shown_M == tokenizer.mask_id, shown_M == masked.label_M
    # For 60,000 tokens the standard deviations are 0.16 and 0.12 percent.
    assert is_mask.mean() == pytest.approx(0.8, abs=0.008)
    assert is_kept.mean() == pytest.approx(0.1, abs=0.006)
    assert (~is_mask & ~is_kept).mean() == pytest.approx(0.1, abs=0.006)


def test_random_tokens_are_spread_evenly_over_the_vocabulary(many, tokenizer):
    _, masked = many
    shown_M = masked.ids_BL.ravel()[masked.index_M]
    random_M = shown_M[(shown_M != tokenizer.mask_id) & (shown_M != masked.label_M)]
    counts = np.histogram(random_M, bins=10, range=(0, tokenizer.vocabulary_size))[0]
    assert (abs(counts / len(random_M) - 0.1) < 0.02).all(), counts


def test_every_position_in_a_caption_is_masked_equally_often(many):
    _, masked = many
    fraction_L = np.bincount(masked.index_M % 22, minlength=22)[1:-1] / 20_000
    assert (abs(fraction_L - 0.15) < 0.012).all(), fraction_L  # the standard deviation is 0.25 percent


def test_labels_are_the_clean_ids_and_all_other_tokens_stay(many):
    ids_BL, masked = many
    assert (masked.label_M == ids_BL.ravel()[masked.index_M]).all()
    others = np.ones(ids_BL.size, bool)
    others[masked.index_M] = False
    assert (masked.ids_BL.ravel()[others] == ids_BL.ravel()[others]).all()


def test_special_tokens_are_never_masked(tokenizer):
    special = [tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id, tokenizer.unknown_id, tokenizer.mask_id]
    ids_BL = np.resize(np.array(special), (5000, 10))
    masked = mask(ids_BL, np.arange(5000), tokenizer)
    assert len(masked.index_M) == 0
    assert (masked.ids_BL == ids_BL).all()


@SAME_EVERY_TIME
@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 12)), min_size=1, max_size=6), st.integers(0, 20))
def test_a_mask_depends_on_its_position_and_not_on_the_rest_of_the_batch(tokenizer, captions, more_padding):
    rows = [1000 + np.arange(length) for _, length in captions]
    ids_BL = pad([*rows, np.full(12 + more_padding, tokenizer.pad_id)], tokenizer.pad_id)[:-1]
    together = mask(ids_BL, [position for position, _ in captions], tokenizer)
    for row, (position, length) in enumerate(captions):
        alone = mask(rows[row][None], [position], tokenizer)
        assert together.ids_BL[row, :length].tolist() == alone.ids_BL[0].tolist()
        is_in_row = together.index_M // ids_BL.shape[1] == row
        assert (together.index_M[is_in_row] % ids_BL.shape[1]).tolist() == alone.index_M.tolist()


def test_the_same_caption_is_masked_differently_at_another_position_and_with_another_seed(tokenizer):
    ids_BL = np.tile(1000 + np.arange(30), (100, 1))
    masks = {tuple(row) for row in mask(ids_BL, np.arange(100), tokenizer).ids_BL.tolist()}
    others = {tuple(row) for row in mask(ids_BL, np.arange(100), tokenizer, rng.key(1, "mlm")).ids_BL.tolist()}
    assert len(masks) > 95 and len(others) > 95 and len(masks & others) < 5


def choose(image_ids, corpora=None, *, first=0, seed=0, group_size=8) -> choices.ImageChoice:
    ids = np.asarray(image_ids, np.uint64)
    corpus = np.zeros(len(ids), np.int64) if corpora is None else np.asarray(corpora)
    return choices.choose_images(ids, corpus, first + np.arange(len(ids)), seed=seed, group_size=group_size)


@pytest.mark.parametrize("group_size", [2, 8, 32, 7])
def test_half_of_each_group_is_positive(group_size):
    labels = choose(np.arange(group_size * 200), group_size=group_size).label_B.reshape(200, group_size)
    assert set(labels.sum(axis=1).tolist()) == {group_size // 2}


def test_every_position_in_a_group_is_positive_half_of_the_time():
    labels = choose(np.arange(8 * 4000)).label_B.reshape(4000, 8)
    assert (abs(labels.mean(axis=0) - 0.5) < 0.04).all()  # the standard deviation is 0.8 percent


def test_a_positive_has_its_own_image():
    choice = choose(np.arange(800))
    is_positive = choice.label_B == 1
    assert (choice.image_B[is_positive] == np.arange(800)[is_positive]).all()


@SAME_EVERY_TIME
@given(st.lists(st.integers(0, 4), min_size=32, max_size=32), st.integers(0, 10**9))
def test_a_negative_is_another_image_of_the_same_group(image_ids, group):
    choice = choose(image_ids, first=8 * group)
    ids, rows = np.array(image_ids), np.arange(32)
    is_negative = choice.label_B == 0
    assert (choice.image_B // 8 == rows // 8).all()
    assert (ids[choice.image_B] != ids)[is_negative].all()


@SAME_EVERY_TIME
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), min_size=32, max_size=32), st.integers(0, 10**9))
def test_a_negative_is_from_the_same_corpus_if_the_group_has_one(pairs, group):
    ids, corpora = np.array(pairs).T
    choice = choose(ids, corpora, first=8 * group)
    for row in np.flatnonzero(choice.label_B == 0):
        group_rows = slice(row // 8 * 8, row // 8 * 8 + 8)
        has_one = ((corpora[group_rows] == corpora[row]) & (ids[group_rows] != ids[row])).any()
        assert (corpora[choice.image_B[row]] == corpora[row]) == has_one


def test_a_group_of_a_single_image_stays_positive():
    choice = choose([5] * 8 + list(range(8)))
    assert choice.label_B[:8].tolist() == [1] * 8
    assert choice.image_B[:8].tolist() == list(range(8))
    assert choice.label_B[8:].sum() == 4


def test_negatives_are_spread_evenly_over_the_other_images():
    choice = choose(np.arange(8 * 4000))
    rows = np.flatnonzero(choice.label_B == 0)
    distance = (choice.image_B[rows] - rows) % 8
    # 16,000 negatives over 7 others: 2286 each, with a standard deviation of 44.
    assert (abs(np.bincount(distance, minlength=8)[1:] - 2286) < 220).all()


@pytest.mark.parametrize("pieces", [2, 4, 16])
def test_the_choice_does_not_depend_on_how_positions_are_divided(pieces):
    ids, corpora = np.arange(128) % 50, np.arange(128) // 5 % 2
    joined = choose(ids, corpora, first=1024, seed=3)
    size = 128 // pieces
    for start in range(0, 128, size):
        piece = choose(ids[start : start + size], corpora[start : start + size], first=1024 + start, seed=3)
        assert (piece.label_B == joined.label_B[start : start + size]).all()
        assert (piece.image_B + start == joined.image_B[start : start + size]).all()


def test_the_choice_changes_with_seed_and_position():
    drawn = [choose(np.arange(64), first=first, seed=seed) for first, seed in ((0, 0), (64, 0), (0, 1))]
    assert len({tuple(choice.label_B.tolist()) for choice in drawn}) == 3


def test_mlm_weights_give_the_published_mean_of_each_micro_batch():
    # The reference averages over the masked tokens of a micro-batch, then over micro-batches and ranks.
    masked_BL = rng.uniform(2, np.arange(32 * 9).reshape(32, 9)) < 0.15
    loss_BL = rng.uniform(3, np.arange(32 * 9).reshape(32, 9))
    index_M = np.flatnonzero(masked_BL)
    weights_M = choices.mlm_weights(index_M, 9, 32, 8)
    groups = [slice(start, start + 8) for start in range(0, 32, 8)]
    published = np.mean([loss_BL[group][masked_BL[group]].mean() for group in groups])
    assert weights_M @ loss_BL.ravel()[index_M] == pytest.approx(published, rel=1e-6)


def test_a_group_without_masked_tokens_has_no_weight():
    weights_M = choices.mlm_weights(np.array([0, 3]), 5, 4, 2)  # both in the first of two groups
    assert weights_M.tolist() == [0.25, 0.25]


def test_a_batch_without_masked_tokens_has_no_weights():
    assert choices.mlm_weights(np.array([], np.int64), 5, 4, 2).tolist() == []
