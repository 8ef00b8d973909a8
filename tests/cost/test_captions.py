"""Lengths of captions that stand for those of the corpora."""

from __future__ import annotations

import pytest

from bridgetower.cost.captions import typical_captions


@pytest.mark.parametrize(("pairs", "mean"), [(1, 12.0), (16, 10.1), (64, 13.0), (512, 12.0)])
def test_typical_captions_have_the_mean_and_the_fraction_of_masked_words(pairs, mean):
    captions = typical_captions(pairs, mean, 50, 0.15)
    assert len(captions.num_tokens) == len(captions.num_masked) == pairs
    assert sum(captions.num_tokens) / pairs == pytest.approx(mean, abs=1.1 if pairs == 1 else 0.15)
    assert sum(captions.num_masked) == pytest.approx(0.15 * (sum(captions.num_tokens) - 2 * pairs), abs=1)
    assert all(masked <= tokens - 2 for tokens, masked in zip(*captions, strict=True) if masked > 1)


def test_typical_captions_keep_within_the_longest_that_the_model_reads():
    assert max(typical_captions(512, 30.0, 40, 0.15).num_tokens) == 40
