"""The scores that the paper reports, each with its source: targets for a run's model after fine-tuning."""

from __future__ import annotations

from typing import NamedTuple


class PaperScore(NamedTuple):
    """One score of one model, after fine-tuning."""

    task: str
    model: str
    percent: float
    source: str


# The test-std scores are in the abstract, and on the leaderboard that microsoft/BridgeTower's README names.
PAPER_SCORES = (
    PaperScore("VQAv2 test-dev, not pretrained", "base, Add&Norm bridges", 75.18, "arXiv 2206.08657, Table 1"),
    PaperScore("VQAv2 test-dev", "base", 78.66, "arXiv 2206.08657"),
    PaperScore("VQAv2 test-std", "base", 78.73, "arXiv 2206.08657, abstract"),
    PaperScore("VQAv2 test-std", "large", 81.15, "arXiv 2206.08657, abstract"),
    PaperScore("VQAv2 test-std", "METER, the same data", 77.64, "arXiv 2206.08657, abstract: base less 1.09"),
    PaperScore("NLVR2 test-P", "base", 83.09, "arXiv 2206.08657"),
)
