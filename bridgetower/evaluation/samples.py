"""Some captions of a held-out split with the model's predictions, as predictions.json holds them for the report.

Shapes: N images and T captions of the split, L tokens, K bridged layers, P image positions, D width, Y x X patches.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridgetower import dist
from bridgetower.evaluation.encode import EncodedCaptions, EncodedImages, merge
from bridgetower.evaluation.masked_words import Guesses
from bridgetower.evaluation.retrieval import Retrieval
from bridgetower.evaluation.scorer import F32, ScoringContext, Split

_NUM_BEST = 5  # best captions and best images of a sample

Attention = dict[int, list[dict[str, Any]]]
"""The tokens of each reported caption with their attention over the image, by the caption's number."""


def choose_captions(num_captions: int, num_samples: int) -> list[int]:
    """Choose evenly spaced captions; all of them if there are no more than ``num_samples``."""
    if num_samples >= num_captions:
        return list(range(num_captions))
    return [sample * num_captions // num_samples for sample in range(num_samples)]


def attend(
    context: ScoringContext, captions: EncodedCaptions, images: EncodedImages, reported: Sequence[int]
) -> Attention:
    """Compute each token's attention probability on every patch of its image; called on all ranks."""
    split, by_block = context.split, images.states_by_block
    attention: Attention = {}
    for caption in reported:
        image = int(split.image_of_caption_T[caption])
        block = max((first for first in by_block if first <= image), default=None)
        if block is None or image - block >= by_block[block].shape[1]:  # the image belongs to another rank
            continue
        batch = split.text_batch(caption, 1, seed=context.seed)
        length = batch.clean_ids_TL.shape[1]
        attention_1LYX = context.scorer.word_attention(
            captions.states_KTLD[:, caption : caption + 1, :length],
            batch.attention_mask_TL.to(context.device),
            by_block[block][:, image - block : image - block + 1],
        )
        if attention_1LYX is None:
            break
        # Without the first and the last token, <s> and </s>.
        tokens, attention_LYX = batch.clean_ids_TL[0].tolist()[1:-1], attention_1LYX[0].cpu().numpy()[1:-1]
        attention[caption] = [
            {"token": split.tokenizer.decode([token]), "shares": attention_YX.astype(float).round(5).tolist()}
            for token, attention_YX in zip(tokens, attention_LYX, strict=True)
        ]
    return merge(dist.gather_objects(attention))


def describe_samples(
    split: Split, reported: Sequence[int], guesses: Guesses, attention: Attention, retrieval: Retrieval
) -> dict[str, Any]:
    """Return the part of predictions.json about one split: captions, predictions, and the files of the images."""
    image_of_T = split.image_of_caption_T.numpy()
    images: set[int] = set()
    samples = []
    for caption in reported:
        image = int(image_of_T[caption])
        images.add(image)
        sample: dict[str, Any] = {
            "caption": split.captions[caption],
            "picture": image,
            "masked_words": guesses.get(caption, []),
            "attention": attention.get(caption, []),
        }
        if retrieval.log_odds_TN is not None:
            sample["match_probability"] = _sigmoid(retrieval.log_odds_TN[caption, image])
        if retrieval.ranking_TN is not None:
            best_images = _best(retrieval.ranking_TN[caption])
            images.update(best_images)
            sample |= _describe_best(split, retrieval, caption, image, best_images)
        samples.append(sample)
    files = {str(image): base64.b64encode(split.image_bytes(image)).decode() for image in sorted(images)}
    return {"samples": samples, "pictures": files}


def _describe_best(
    split: Split, retrieval: Retrieval, caption: int, image: int, best_images: Sequence[int]
) -> Mapping[str, Any]:
    """Describe the best captions of an image, and the best images of a caption.

    Each with whether it is right and, where ITM judged the pair, ITM's probability of a match.
    """
    assert retrieval.ranking_TN is not None
    is_match_TN, log_odds_TN = retrieval.is_match_TN, retrieval.log_odds_TN
    return {
        "best_captions": [
            [split.captions[best], bool(is_match_TN[best, image]), _match_probability(log_odds_TN, best, image)]
            for best in _best(retrieval.ranking_TN[:, image])
        ],
        "best_pictures": [
            [best, bool(is_match_TN[caption, best]), _match_probability(log_odds_TN, caption, best)]
            for best in best_images
        ],
    }


def _best(scores: F32) -> list[int]:
    """Return the indices of the best candidates, best first."""
    order = np.argsort(-scores, kind="stable")[:_NUM_BEST]
    return [int(index) for index in order if np.isfinite(scores[index])]


def _match_probability(log_odds_TN: F32 | None, caption: int, image: int) -> float | None:
    """Return ITM's probability that a pair matches; None if ITM did not judge the pair."""
    if log_odds_TN is None or not np.isfinite(log_odds_TN[caption, image]):
        return None
    return _sigmoid(log_odds_TN[caption, image])


def _sigmoid(log_odds: float) -> float:
    return round(float(1 / (1 + np.exp(-float(log_odds)))), 4)
