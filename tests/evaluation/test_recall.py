"""Recall against an explicit ranking, with ties, and its chance level against all rankings."""

from __future__ import annotations

from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.evaluation.recall import chance_recall_at, recall_at

SAME_EVERY_TIME = settings(derandomize=True, deadline=None)


@st.composite
def judged_scores(draw):
    """Draw small whole scores, so that many are equal, and right answers, at least one per query."""
    queries, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    score = st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0])
    scores = [[draw(score) for _ in range(candidates)] for _ in range(queries)]
    is_match = [[draw(st.booleans()) for _ in range(candidates)] for _ in range(queries)]
    for row in is_match:
        row[draw(st.integers(0, candidates - 1))] = True
    return np.array(scores), np.array(is_match)


@SAME_EVERY_TIME
@given(judged_scores(), st.integers(1, 8))
def test_recall_equals_that_of_the_worst_ranking_that_the_scores_allow(judged, k):
    scores, is_match = judged
    hits = 0
    for row, right in zip(scores, is_match, strict=True):
        # Best first; among equals the wrong ones first.
        ranking = sorted(range(len(row)), key=lambda index: (-row[index], right[index]))
        hits += any(right[index] for index in ranking[:k])
    assert recall_at(scores, is_match, [k]) == {k: pytest.approx(hits / len(scores))}


def test_model_that_gives_every_pair_the_same_score_is_never_right():
    is_match = np.eye(20, dtype=bool)
    assert recall_at(np.ones((20, 20)), is_match, [1, 5, 10]) == {1: 0, 5: 0, 10: 0}


def test_model_whose_scores_are_nan_is_never_right():
    is_match = np.eye(20, dtype=bool)
    assert recall_at(np.full((20, 20), np.nan), is_match, [1, 10]) == {1: 0, 10: 0}
    # Also where only the wrong candidates score nan: they count as better.
    scores = np.where(is_match, 1.0, np.nan)
    assert recall_at(scores, is_match, [1]) == {1: 0}


def test_right_answer_that_is_no_candidate_is_not_found():
    scores = np.array([[-np.inf, 0.3, -np.inf, -np.inf]])
    assert recall_at(scores, np.array([[True, False, False, False]]), [1, 3]) == {1: 0, 3: 0}


def test_best_of_several_right_answers_counts():
    is_match = np.array([[True, False, True, False]])
    assert recall_at(np.array([[0.1, 0.5, 0.9, 0.2]]), is_match, [1]) == {1: 1}
    assert recall_at(np.array([[0.1, 0.9, 0.5, 0.2]]), is_match, [1, 2]) == {1: 0, 2: 1}


def test_query_without_a_right_answer_fails_an_assertion():
    with pytest.raises(AssertionError, match="needs a right answer"):
        recall_at(np.ones((2, 2)), np.array([[True, False], [False, False]]), [1])


@pytest.mark.parametrize("num_right", [1, 2, 3, 5])
def test_chance_is_the_mean_over_every_ranking(num_right):
    is_match = np.arange(5) < num_right
    rankings = list(permutations(range(5)))
    for k in (1, 2, 4, 5, 9):
        expected = np.mean([any(is_match[index] for index in ranking[:k]) for ranking in rankings])
        assert chance_recall_at(is_match[None], [k])[k] == pytest.approx(expected)


def test_chance_of_single_answers_is_k_of_n():
    # As in the demo: 330 images with one caption each.
    assert chance_recall_at(np.eye(330, dtype=bool), [1, 5, 10]) == pytest.approx(
        {1: 1 / 330, 5: 5 / 330, 10: 10 / 330}
    )


def test_chance_is_the_mean_over_queries_with_different_numbers_of_answers():
    # As in COCO: five captions per image, and more where images repeat.
    is_match = np.arange(100)[None] < np.array([[5], [10], [1]])
    expected = np.mean([1 - comb(100 - right, 10) / comb(100, 10) for right in (5, 10, 1)])
    assert chance_recall_at(is_match, [10])[10] == pytest.approx(expected)


def test_recall_of_random_scores_is_chance():
    rng = np.random.default_rng(0)
    is_match = rng.random((400, 50)) < 0.05
    is_match[:, 0] = True
    recall, chance = recall_at(rng.random((400, 50)), is_match, [1, 5]), chance_recall_at(is_match, [1, 5])
    for k in (1, 5):
        # Four standard errors of 400 draws.
        assert abs(recall[k] - chance[k]) < 4 * (chance[k] * (1 - chance[k]) / 400) ** 0.5
