"""The table of held-out scores."""

from __future__ import annotations

from bridgetower.evaluation.scorer import SplitScores
from bridgetower.evaluation.table import LABELS, format_score, print_scores


def test_fractions_are_shown_in_percent_and_losses_as_they_are():
    assert format_score("t2i_r1", 0.3456) == "34.6%" and format_score("mlm_loss", 2.34567) == "2.346"


def test_table_has_a_column_per_split_and_the_chance_levels(capsys):
    scored = SplitScores({"t2i_r1": 0.5, "mlm_loss": 2.0}, {"t2i_r1": 0.003}, {})
    print_scores(7, {"combination": scored, "concept": SplitScores({"mlm_loss": 3.0}, {}, {})})
    printed = capsys.readouterr().out
    assert "after step 7" in printed and "combination" in printed and "concept" in printed
    assert "50.0%  (0.3%)" in printed and "2.000" in printed and "3.000" in printed
    # A score that no split has is left out.
    assert LABELS["itm_balanced_accuracy"] not in printed
