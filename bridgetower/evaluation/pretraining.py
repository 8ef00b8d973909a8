"""Every score of a pretraining task on one held-out split: MLM, ITM and retrieval.

Each image and each caption passes its tower once, each pair that is judged passes the cross-modal encoder once.
"""

from __future__ import annotations

import numpy as np
import torch

from bridgetower import dist
from bridgetower.config.run import EvaluationConfig
from bridgetower.errors import DataError
from bridgetower.evaluation.encode import encode_captions, encode_images
from bridgetower.evaluation.masked_words import Guesses, chance_of_masked_words, score_masked_words
from bridgetower.evaluation.retrieval import score_retrieval
from bridgetower.evaluation.samples import attend, choose_captions, describe_samples
from bridgetower.evaluation.scorer import Scorer, ScoringContext, Split, SplitScores


@torch.no_grad()
def evaluate_split(
    scorer: Scorer, split: Split, config: EvaluationConfig, *, seed: int, device: torch.device
) -> SplitScores:
    """Score one split; called on all ranks, and the same at any number of ranks.

    Args:
        scorer: in evaluation mode, on ``device``.
        seed: seed of masks and random negatives.

    Raises:
        DataError: the split has fewer than two different images.
    """
    if len(np.unique(split.image_id_N.numpy())) < 2:
        raise DataError(f"The held-out split {split.name} has {split.num_images} image(s); matching needs two or more.")
    context = ScoringContext(scorer, split, config.batch_size, seed, device)
    captions, images = encode_captions(context), encode_images(context)
    reported = choose_captions(split.num_captions, config.num_samples)
    scores: dict[str, float] = {}
    chance: dict[str, float] = {}
    guesses: Guesses = {}
    if scorer.objectives.mlm:
        words = score_masked_words(context, images, frozenset(reported))
        guesses = words.guesses
        scores |= words.scores
        chance |= chance_of_masked_words(split.tokenizer.vocabulary_size)
    retrieval = score_retrieval(context, captions, images, config)
    scores |= retrieval.scores
    chance |= retrieval.chance
    attention = attend(context, captions, images, reported)
    samples = {}
    if dist.rank() == 0:
        samples = describe_samples(split, reported, guesses, attention, retrieval)
    return SplitScores(scores, chance, samples)
