"""ITM and retrieval on a held-out split: ITC ranks all pairs, ITM judges and re-ranks the best of them.

Shapes: N images and T captions of the split, B images of a block, R pairs of a forward pass, L tokens,
K bridged layers, P image positions, D width, C contrastive width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from bridgetower import dist, rng
from bridgetower.config.run import EvaluationConfig
from bridgetower.evaluation.encode import EncodedCaptions, EncodedImages, merge, select_images
from bridgetower.evaluation.recall import RECALL_AT, chance_recall_at, recall_at
from bridgetower.evaluation.scorer import F32, I64, Bool, ScoringContext, Split


class Retrieval(NamedTuple):
    """Scores of ITM and of retrieval, and the matrices that they come from."""

    scores: dict[str, float]
    chance: dict[str, float]
    is_match_TN: Bool
    """True where a caption and an image belong together."""
    ranking_TN: F32 | None
    """What captions and images rank each other by, -inf for pairs that are no candidates; None without ITC."""
    log_odds_TN: F32 | None
    """ITM's log odds of a match, -inf for pairs that ITM did not judge; None without ITM."""


class _Judgement(NamedTuple):
    """ITM's logits of the pairs that it judged."""

    logits_TN2: F32
    """0 for pairs that were not judged; column 1 is a match."""
    log_odds_TN: F32
    """-inf for pairs that were not judged."""
    balanced_accuracy: float
    """Mean of the fractions of true pairs and of random negatives that ITM judges right."""


def score_retrieval(
    context: ScoringContext, captions: EncodedCaptions, images: EncodedImages, config: EvaluationConfig
) -> Retrieval:
    """Score ITM, and retrieval in both directions; called on all ranks.

    With ITC and ITM, ITM re-ranks the ``rerank_top_k`` best candidates of each query. With ITC alone, ITC ranks. With
    ITM alone, ITM judges every pair of the first ``max_images_without_itc`` images and their captions: a limit,
    because each pair costs a pass through the cross-modal encoder.
    """
    is_match_TN = _find_matches(context.split)
    if captions.embedding_TC is None or images.embedding_NC is None:
        return _score_gallery(context, captions, images, is_match_TN, config.max_images_without_itc)
    similarity_TN = captions.embedding_TC @ images.embedding_NC.T
    scores, chance = _recalls("itc_", similarity_TN, is_match_TN), _chance_recalls("itc_", is_match_TN)
    if not context.scorer.objectives.itm:
        return Retrieval(scores, chance, is_match_TN, similarity_TN, None)
    candidates_TN = _top_candidates(similarity_TN, config.rerank_top_k)
    judged = _judge(context, captions, images, candidates_TN)
    reranked_TN = judged.log_odds_TN
    if config.rerank_score == "itm_logit":
        reranked_TN = judged.logits_TN2[..., 1]
    elif config.rerank_score == "itm_and_itc":
        reranked_TN = judged.log_odds_TN + similarity_TN / context.scorer.contrast_temperature()
    ranking_TN = np.where(candidates_TN, reranked_TN, -np.inf)
    scores |= {"itm_balanced_accuracy": judged.balanced_accuracy, **_recalls("", ranking_TN, is_match_TN)}
    chance |= {"itm_balanced_accuracy": 0.5, **_chance_recalls("", is_match_TN)}
    return Retrieval(scores, chance, is_match_TN, ranking_TN, judged.log_odds_TN)


def _score_gallery(
    context: ScoringContext, captions: EncodedCaptions, images: EncodedImages, is_match_TN: Bool, max_images: int
) -> Retrieval:
    """Score ITM, and retrieval among the first images, without ITC."""
    if not context.scorer.objectives.itm:
        return Retrieval({}, {}, is_match_TN, None, None)
    gallery_size = min(context.split.num_images, max_images)
    in_gallery_T = context.split.image_of_caption_T.numpy() < gallery_size
    candidates_TN = np.zeros(is_match_TN.shape, bool)
    candidates_TN[in_gallery_T, :gallery_size] = True
    judged = _judge(context, captions, images, candidates_TN)
    is_match_in_gallery = is_match_TN[in_gallery_T, :gallery_size]
    ranking_in_gallery = judged.log_odds_TN[in_gallery_T, :gallery_size]
    scores = {
        "itm_balanced_accuracy": judged.balanced_accuracy,
        **_recalls("", ranking_in_gallery, is_match_in_gallery),
    }
    chance = {"itm_balanced_accuracy": 0.5, **_chance_recalls("", is_match_in_gallery)}
    return Retrieval(scores, chance, is_match_TN, None, judged.log_odds_TN)


def _judge(
    context: ScoringContext, captions: EncodedCaptions, images: EncodedImages, candidates_TN: Bool
) -> _Judgement:
    """Run ITM on the candidates, and on each caption's own image and one random negative."""
    each_T, image_of_T = np.arange(context.split.num_captions), context.split.image_of_caption_T.numpy()
    negative_T = _draw_negatives(context.split, context.seed)
    judged_TN = candidates_TN.copy()
    judged_TN[each_T, image_of_T] = True
    judged_TN[each_T, negative_T] = True
    logits_TN2 = _run_itm(context, captions, images, judged_TN)
    log_odds_TN = np.where(judged_TN, logits_TN2[..., 1] - logits_TN2[..., 0], np.float32(-np.inf))
    right_on_matches = (log_odds_TN[each_T, image_of_T] > 0).mean()
    right_on_negatives = (log_odds_TN[each_T, negative_T] <= 0).mean()
    return _Judgement(logits_TN2, log_odds_TN, float((right_on_matches + right_on_negatives) / 2))


def _run_itm(context: ScoringContext, captions: EncodedCaptions, images: EncodedImages, judged_TN: Bool) -> F32:
    """Compute ITM's logits of the pairs marked in ``judged_TN``, shape (T, N, 2); 0 for the others."""
    by_block: dict[int, F32] = {}
    for first_image, states_KBPD in images.states_by_block.items():
        judged_TB = judged_TN[:, first_image : first_image + states_KBPD.shape[1]]
        # Image by image, so that a forward pass needs few images.
        image_of_pair, caption_of_pair = np.nonzero(judged_TB.T)
        logits = []
        for first in range(0, len(caption_of_pair), context.batch_size):
            caption_R = torch.from_numpy(caption_of_pair[first : first + context.batch_size]).to(context.device)
            images_KNPD, image_R = select_images(states_KBPD, image_of_pair[first : first + context.batch_size])
            mask_RL = captions.mask_TL[caption_R]
            longest = int(mask_RL.sum(dim=1).max())
            logits_R2 = context.scorer.match_logits(
                captions.states_KTLD[:, caption_R, :longest], mask_RL[:, :longest], images_KNPD, image_R
            )
            logits.append(logits_R2.cpu().numpy())
        logits_TB2 = np.zeros((*judged_TB.shape, 2), np.float32)
        logits_TB2[caption_of_pair, image_of_pair] = np.concatenate(logits) if logits else 0
        by_block[first_image] = logits_TB2
    blocks = merge(dist.gather_objects(by_block))
    return np.concatenate([blocks[first] for first in sorted(blocks)], axis=1)


def _find_matches(split: Split) -> Bool:
    """Mark the pairs whose image is the caption's own, or has the same image id."""
    image_id_N = split.image_id_N.numpy()
    is_match_TN: Bool = image_id_N[split.image_of_caption_T.numpy()][:, None] == image_id_N[None, :]
    return is_match_TN


def _top_candidates(similarity_TN: F32, top_k: int) -> Bool:
    """Mark the ``top_k`` best images of each caption and the ``top_k`` best captions of each image."""
    is_candidate_TN = np.zeros(similarity_TN.shape, bool)
    best_images = np.argsort(-similarity_TN, axis=1, kind="stable")[:, :top_k]
    np.put_along_axis(is_candidate_TN, best_images, True, axis=1)
    best_captions = np.argsort(-similarity_TN, axis=0, kind="stable")[:top_k]
    np.put_along_axis(is_candidate_TN, best_captions, True, axis=0)
    return is_candidate_TN


def _draw_negatives(split: Split, seed: int) -> I64:
    """Draw for each caption one image with another image id, uniformly."""
    image_id_N, image_of_T = split.image_id_N.numpy(), split.image_of_caption_T.numpy()
    stream = rng.key(seed, "held-out negative")
    negative_T = np.empty(len(image_of_T), np.int64)
    for caption, image in enumerate(image_of_T):
        others = np.flatnonzero(image_id_N != image_id_N[image])
        negative_T[caption] = others[rng.below(stream, caption, len(others))]
    return negative_T


def _recalls(prefix: str, scores_TN: F32, is_match_TN: Bool) -> dict[str, float]:
    """Compute recall at each cut-off in both directions, by the names of eval.json."""
    t2i = recall_at(scores_TN, is_match_TN, RECALL_AT)
    i2t = recall_at(scores_TN.T, is_match_TN.T, RECALL_AT)
    return {f"{prefix}{way}_r{k}": recalls[k] for way, recalls in (("i2t", i2t), ("t2i", t2i)) for k in RECALL_AT}


def _chance_recalls(prefix: str, is_match_TN: Bool) -> dict[str, float]:
    """Compute the recalls of a random ranking, by the names of eval.json."""
    t2i, i2t = chance_recall_at(is_match_TN, RECALL_AT), chance_recall_at(is_match_TN.T, RECALL_AT)
    return {f"{prefix}{way}_r{k}": recalls[k] for way, recalls in (("i2t", i2t), ("t2i", t2i)) for k in RECALL_AT}
