"""Recall at k from a matrix of scores, and its chance level. NumPy only.

Shapes: Q queries, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RECALL_AT = (1, 5, 10)
"""The cut-offs of every retrieval score."""


def recall_at(
    scores_QN: npt.NDArray[np.floating], is_match_QN: npt.NDArray[np.bool_], ks: Sequence[int]
) -> dict[int, float]:
    """Compute the fraction of queries whose best right answer is among the k best candidates.

    A wrong candidate with the same score counts as better, and so does one with the score nan: a model that gives
    every pair the same score, or nan, gets 0, not 1.

    Args:
        scores_QN: higher is better; -inf for a pair that is no candidate.
        is_match_QN: True for right answers; every row needs one.
        ks: the cut-offs.
    """
    assert is_match_QN.any(axis=1).all(), "each query needs a right answer"
    best_match_Q1 = np.where(is_match_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
    num_better_Q = (~(scores_QN < best_match_Q1) & ~is_match_QN).sum(axis=1)
    return {k: float((num_better_Q < k).mean()) for k in ks}


def chance_recall_at(is_match_QN: npt.NDArray[np.bool_], ks: Sequence[int]) -> dict[int, float]:
    """Compute the expected recall of a random ranking: 1 - C(N - m, k) / C(N, k) for m right answers among N."""
    num_candidates = is_match_QN.shape[1]
    num_matches_Q = is_match_QN.sum(axis=1).astype(np.float64)
    chances = {}
    for k in ks:
        # Probability that none of the k drawn candidates is right, one draw after the other.
        miss_Q = np.ones(len(num_matches_Q))
        for drawn in range(min(k, num_candidates)):
            miss_Q *= np.clip(num_candidates - num_matches_Q - drawn, 0, None) / (num_candidates - drawn)
        chances[k] = float(1 - miss_Q.mean())
    return chances
