"""Scores on held-out splits: MLM, ITM and retrieval, from one pass per image and caption and one per needed pair.

The images are cut into blocks of a fixed size, and each block with its pairs belongs to one rank, so that the scores
do not depend on the number of ranks. So are the captions, but any image may be asked for with any caption: each rank
gets the states of all, a gigabyte for 5,000 captions of the base model in bf16.

Shapes: N images and T captions of the split, R pairs of a pass, L tokens, M masked tokens, K bridged layers, D width,
C contrastive width, V vocabulary.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower import dist, rng
from bridgetower.batch import ImageBatch, TextBatch
from bridgetower.config.run import EvaluationConfig, ObjectivesConfig
from bridgetower.errors import DataError
from bridgetower.evaluation.recall import chance_recall_at, recall_at
from bridgetower.io.files import write_atomically

RECALL_AT = (1, 5, 10)
EVAL_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.json"
_SHOWN = 5  # best captions and pictures of a sample

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Encoded(Protocol):
    """Encoded images or captions."""

    @property
    def states_KBND(self) -> Tensor:
        """Bridged layers, ready for the cross-modal encoder."""

    @property
    def embedding_BC(self) -> Tensor | None:
        """Unit vectors for retrieval by ITC, if there is ITC."""


class Scorer(Protocol):
    """What is evaluated: a pretraining task."""

    objectives: ObjectivesConfig

    def image_features(self, pixels_N3SS: Tensor) -> Encoded:
        """Encode uint8 images."""

    def text_features(self, ids_TL: Tensor, attention_mask_TL: Tensor) -> Encoded:
        """Encode captions."""

    def match_logits(self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor) -> Tensor:
        """Judge encoded pairs, each of a text and one of the images, by ITM, shape (R, 2); column 1 is a match."""

    def contrast_temperature(self) -> float:
        """ITC's temperature."""

    def masked_logits(
        self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor, index_M: Tensor
    ) -> Tensor:
        """Predict masked words of encoded pairs, shape (M, V); the index is on the CPU."""

    def word_attention(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor) -> Tensor | None:
        """Tell where each token of encoded pairs looks in its image, shape (R, L, Y, X); None without fusion."""


class Split(Protocol):
    """What it is evaluated on."""

    name: str
    num_images: int
    num_captions: int
    captions: list[str]
    image_of_caption_T: Tensor
    image_id_N: Tensor
    tokenizer: Any

    def image_batch(self, first: int, size: int) -> ImageBatch:
        """Give consecutive images."""

    def text_batch(self, first: int, size: int, *, seed: int) -> TextBatch:
        """Give consecutive captions, clean and masked."""

    def image_bytes(self, number: int) -> bytes:
        """Give the file of an image, for the report."""


class SplitScores(NamedTuple):
    """The result for one split."""

    scores: dict[str, float]
    """Fractions, by the names of eval.json; losses in nats."""
    chance: dict[str, float]
    """What guessing gives, for the same names where it means something."""
    samples: dict[str, Any]
    """Some captions and pictures with what the model says of them, for the report. Empty but on rank 0."""


class _Captions(NamedTuple):
    """All captions of the split, encoded, padded to the longest."""

    states_KTLD: Tensor
    mask_TL: Tensor
    embedding_TC: F32 | None


class _MaskedWords(NamedTuple):
    """MLM on some captions."""

    loss_sum: float
    num_right: int
    num_tokens: int
    shown: dict[int, list[dict[str, Any]]]  # caption -> its masked tokens with the model's guesses


@torch.no_grad()
def evaluate_split(
    scorer: Scorer, split: Split, config: EvaluationConfig, *, seed: int, device: torch.device
) -> SplitScores:
    """Score one split on all ranks.

    Args:
        scorer: in evaluation mode, on ``device``.
        seed: of masks and random negatives.

    Raises:
        DataError: the split has fewer than two different images.
    """
    image_id_N = split.image_id_N.numpy()
    if len(np.unique(image_id_N)) < 2:
        raise DataError(f"The held-out split {split.name} has {split.num_images} image(s); matching needs two or more.")
    image_of_T = split.image_of_caption_T.numpy()
    batch_size = config.batch_size
    blocks = range(0, split.num_images, batch_size)
    own_blocks = [first for number, first in enumerate(blocks) if number % dist.world_size() == dist.rank()]
    captions = _encode_captions(scorer, split, batch_size, seed, device)
    states_by_block: dict[int, Tensor] = {}
    own_embeddings: dict[int, F32] = {}
    for first in own_blocks:
        encoded = scorer.image_features(split.image_batch(first, batch_size).pixels_N3SS.to(device))
        states_by_block[first] = encoded.states_KBND
        if encoded.embedding_BC is not None:
            own_embeddings[first] = encoded.embedding_BC.float().cpu().numpy()
    shown = _spread(split.num_captions, config.num_samples)
    scores: dict[str, float] = {}
    chance: dict[str, float] = {}
    words: dict[int, list[dict[str, Any]]] = {}
    if scorer.objectives.mlm:
        masked = _score_masked_words(scorer, split, states_by_block, batch_size, seed, device, set(shown))
        scores |= {
            "mlm_loss": masked.loss_sum / masked.num_tokens,
            "mlm_accuracy": masked.num_right / masked.num_tokens,
        }
        num_ids = split.tokenizer.vocabulary_size
        chance |= {"mlm_loss": math.log(num_ids), "mlm_accuracy": 1 / num_ids}
        words = masked.shown
    similarity_TN: F32 | None = None
    ranking_TN: F32 | None = None
    candidates_TN = np.zeros((split.num_captions, split.num_images), bool)
    is_match_TN = image_id_N[image_of_T][:, None] == image_id_N[None, :]
    if captions.embedding_TC is not None:
        embeddings = _merge(dist.gather_objects(own_embeddings))
        similarity_TN = captions.embedding_TC @ np.concatenate([embeddings[first] for first in blocks]).T
        scores |= _recalls("itc_", similarity_TN, is_match_TN)
        chance |= _chance("itc_", is_match_TN)
        candidates_TN = _top_candidates(similarity_TN, config.rerank_top_k)
        ranking_TN = similarity_TN
    log_odds_TN: F32 | None = None
    if scorer.objectives.itm:
        negative_T = _random_other_image(image_id_N, image_of_T, seed)
        asked_TN = candidates_TN.copy()
        asked_TN[np.arange(split.num_captions), image_of_T] = True
        asked_TN[np.arange(split.num_captions), negative_T] = True
        gallery = min(split.num_images, config.max_images_without_itc)
        in_gallery_T = image_of_T < gallery
        if similarity_TN is None:
            asked_TN[in_gallery_T, :gallery] = True
        logits_TN2 = _score_pairs(scorer, captions, states_by_block, asked_TN, batch_size, device)
        log_odds_TN = np.where(asked_TN, logits_TN2[..., 1] - logits_TN2[..., 0], np.float32(-np.inf))
        own_T = log_odds_TN[np.arange(split.num_captions), image_of_T]
        other_T = log_odds_TN[np.arange(split.num_captions), negative_T]
        scores["itm_balanced_accuracy"] = float(((own_T > 0).mean() + (other_T <= 0).mean()) / 2)
        chance["itm_balanced_accuracy"] = 0.5
        if similarity_TN is not None:
            reranked_TN = logits_TN2[..., 1] if config.rerank_score == "itm_logit" else log_odds_TN
            if config.rerank_score == "itm_and_itc":
                reranked_TN = log_odds_TN + similarity_TN / scorer.contrast_temperature()
            ranking_TN = np.where(candidates_TN, reranked_TN, -np.inf)
            scores |= _recalls("", ranking_TN, is_match_TN)
            chance |= _chance("", is_match_TN)
        else:
            right_TN = is_match_TN[in_gallery_T, :gallery]
            scores |= _recalls("", log_odds_TN[in_gallery_T, :gallery], right_TN)
            chance |= _chance("", right_TN)
    looks = _look_of_words(scorer, split, captions, states_by_block, shown, seed, device)
    samples = {}
    if dist.rank() == 0:
        samples = _describe_samples(split, shown, words, looks, ranking_TN, log_odds_TN, is_match_TN)
    return SplitScores(scores, chance, samples)


def _encode_captions(scorer: Scorer, split: Split, batch_size: int, seed: int, device: torch.device) -> _Captions:
    states, masks, embeddings = [], [], []
    for number, first in enumerate(range(0, split.num_captions, batch_size)):
        batch = split.text_batch(first, batch_size, seed=seed)
        mask_TL = batch.attention_mask_TL.to(device)
        masks.append(mask_TL)
        owner = number % dist.world_size()
        own = scorer.text_features(batch.clean_ids_TL.to(device), mask_TL) if owner == dist.rank() else None
        states.append(dist.from_rank(owner, None if own is None else own.states_KBND, device))
        if scorer.objectives.itc:
            embeddings.append(
                dist.from_rank(owner, None if own is None else own.embedding_BC, device).float().cpu().numpy()
            )
    longest = max(mask.shape[1] for mask in masks)
    return _Captions(
        torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in states], dim=1),
        torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]),
        np.concatenate(embeddings) if embeddings else None,
    )


def _score_masked_words(
    scorer: Scorer,
    split: Split,
    states_by_block: Mapping[int, Tensor],
    batch_size: int,
    seed: int,
    device: torch.device,
    shown: set[int],
) -> _MaskedWords:
    """Each caption once, with its own image."""
    image_of_T = split.image_of_caption_T.numpy()
    loss_sum, num_right, num_tokens = 0.0, 0, 0
    guesses: dict[int, list[dict[str, Any]]] = {}
    for first_image, states_KBND in states_by_block.items():
        # Captions stand in the order of their images, so those of a block are consecutive.
        low, high = np.searchsorted(image_of_T, [first_image, first_image + states_KBND.shape[1]]).tolist()
        for first in range(low, high, batch_size):
            batch = split.text_batch(first, min(batch_size, high - first), seed=seed)
            if not len(batch.mlm_index_M):
                continue
            mask_TL = batch.attention_mask_TL.to(device)
            text = scorer.text_features(batch.masked_ids_TL.to(device), mask_TL)
            images_KNPD, image_R = _needed(states_KBND, image_of_T[first : first + len(mask_TL)] - first_image)
            logits_MV = scorer.masked_logits(text.states_KBND, mask_TL, images_KNPD, image_R, batch.mlm_index_M)
            label_M = batch.mlm_label_M.to(device)
            loss_sum += float(F.cross_entropy(logits_MV, label_M, reduction="sum"))
            num_right += int((logits_MV.argmax(dim=1) == label_M).sum())
            num_tokens += len(label_M)
            _note_guesses(guesses, batch, logits_MV, split.tokenizer, shown)
    parts = dist.gather_objects(_MaskedWords(loss_sum, num_right, num_tokens, guesses))
    return _MaskedWords(
        sum(part.loss_sum for part in parts),
        sum(part.num_right for part in parts),
        max(1, sum(part.num_tokens for part in parts)),
        _merge(part.shown for part in parts),
    )


def _note_guesses(
    guesses: dict[int, list[dict[str, Any]]], batch: TextBatch, logits_MV: Tensor, tokenizer: Any, shown: set[int]
) -> None:
    num_tokens = batch.clean_ids_TL.shape[1]
    for number, flat in enumerate(batch.mlm_index_M.tolist()):
        row, column = divmod(flat, num_tokens)
        if batch.first + row not in shown:
            continue
        best = logits_MV[number].softmax(dim=0).topk(3)
        clean = batch.clean_ids_TL[row, 1 : int(batch.attention_mask_TL[row].sum()) - 1].tolist()
        guesses.setdefault(batch.first + row, []).append(
            {
                "before": tokenizer.decode(clean[: column - 1]),
                "word": tokenizer.decode([clean[column - 1]]),
                "after": tokenizer.decode(clean[column:]),
                "guesses": [
                    [tokenizer.decode([token]), round(share, 4)]
                    for token, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ],
                "is_right": best.indices[0].item() == batch.mlm_label_M[number].item(),
            }
        )


def _look_of_words(
    scorer: Scorer,
    split: Split,
    captions: _Captions,
    states_by_block: Mapping[int, Tensor],
    shown: Sequence[int],
    seed: int,
    device: torch.device,
) -> dict[int, list[dict[str, Any]]]:
    """For each shown caption its tokens, each with its share of attention on every place of the picture."""
    own: dict[int, list[dict[str, Any]]] = {}
    for caption in shown:
        image = int(split.image_of_caption_T[caption])
        block = max((first for first in states_by_block if first <= image), default=None)
        if block is None or image - block >= states_by_block[block].shape[1]:  # another rank's
            continue
        batch = split.text_batch(caption, 1, seed=seed)
        length = batch.clean_ids_TL.shape[1]
        shares_1LYX = scorer.word_attention(
            captions.states_KTLD[:, caption : caption + 1, :length],
            batch.attention_mask_TL.to(device),
            states_by_block[block][:, image - block : image - block + 1],
        )
        if shares_1LYX is None:
            break
        tokens, shares_LYX = batch.clean_ids_TL[0].tolist()[1:-1], shares_1LYX[0].cpu().numpy()[1:-1]
        own[caption] = [
            {"token": split.tokenizer.decode([token]), "shares": shares_YX.astype(float).round(5).tolist()}
            for token, shares_YX in zip(tokens, shares_LYX, strict=True)
        ]
    return _merge(dist.gather_objects(own))


def _score_pairs(
    scorer: Scorer,
    captions: _Captions,
    states_by_block: Mapping[int, Tensor],
    asked_TN: npt.NDArray[np.bool_],
    batch_size: int,
    device: torch.device,
) -> F32:
    """ITM's logits where asked, shape (T, N, 2); 0 elsewhere."""
    own: dict[int, F32] = {}
    for first_image, states_KBND in states_by_block.items():
        block = asked_TN[:, first_image : first_image + states_KBND.shape[1]]
        image_R, text_R = np.nonzero(block.T)
        parts = []
        for first in range(0, len(text_R), batch_size):
            texts = torch.from_numpy(text_R[first : first + batch_size]).to(device)
            images_KNPD, rows_R = _needed(states_KBND, image_R[first : first + batch_size])
            mask_RL = captions.mask_TL[texts]
            longest = int(mask_RL.sum(dim=1).max())
            logits_R2 = scorer.match_logits(
                captions.states_KTLD[:, texts, :longest], mask_RL[:, :longest], images_KNPD, rows_R
            )
            parts.append(logits_R2.cpu().numpy())
        result = np.zeros((*block.shape, 2), np.float32)
        result[text_R, image_R] = np.concatenate(parts) if parts else 0
        own[first_image] = result
    blocks = _merge(dist.gather_objects(own))
    return np.concatenate([blocks[first] for first in sorted(blocks)], axis=1)


def _needed(states_KBPD: Tensor, image_R: I64) -> tuple[Tensor, Tensor]:
    """The images that some pairs need, each once, and which of them is that of each pair."""
    images_N, rows_R = np.unique(image_R, return_inverse=True)
    device = states_KBPD.device
    return states_KBPD[:, torch.from_numpy(images_N).to(device)], torch.from_numpy(rows_R).to(device)


def _top_candidates(similarity_TN: F32, top_k: int) -> npt.NDArray[np.bool_]:
    """Pairs among the best of their caption or of their image."""
    is_candidate_TN = np.zeros(similarity_TN.shape, bool)
    best_images = np.argsort(-similarity_TN, axis=1, kind="stable")[:, :top_k]
    np.put_along_axis(is_candidate_TN, best_images, True, axis=1)
    best_texts = np.argsort(-similarity_TN, axis=0, kind="stable")[:top_k]
    np.put_along_axis(is_candidate_TN, best_texts, True, axis=0)
    return is_candidate_TN


def _random_other_image(image_id_N: I64, image_of_T: I64, seed: int) -> I64:
    """For each caption one image of another id, uniformly."""
    stream = rng.key(seed, "held-out negative")
    negative_T = np.empty(len(image_of_T), np.int64)
    for number, own in enumerate(image_of_T):
        others = np.flatnonzero(image_id_N != image_id_N[own])
        negative_T[number] = others[rng.below(stream, number, len(others))]
    return negative_T


def _recalls(prefix: str, scores_TN: F32, is_match_TN: npt.NDArray[np.bool_]) -> dict[str, float]:
    t2i = recall_at(scores_TN, is_match_TN, RECALL_AT)
    i2t = recall_at(scores_TN.T, is_match_TN.T, RECALL_AT)
    return {f"{prefix}{name}_r{k}": part[k] for name, part in (("i2t", i2t), ("t2i", t2i)) for k in RECALL_AT}


def _chance(prefix: str, is_match_TN: npt.NDArray[np.bool_]) -> dict[str, float]:
    t2i, i2t = chance_recall_at(is_match_TN, RECALL_AT), chance_recall_at(is_match_TN.T, RECALL_AT)
    return {f"{prefix}{name}_r{k}": part[k] for name, part in (("i2t", i2t), ("t2i", t2i)) for k in RECALL_AT}


def _spread(count: int, wanted: int) -> list[int]:
    """Evenly spaced numbers below ``count``."""
    return [number * count // wanted for number in range(wanted)] if wanted < count else list(range(count))


def _merge(parts: Iterable[Mapping[int, Any]]) -> dict[int, Any]:
    return {number: value for part in parts for number, value in part.items()}


def _describe_samples(
    split: Split,
    shown: Sequence[int],
    words: Mapping[int, list[dict[str, Any]]],
    looks: Mapping[int, list[dict[str, Any]]],
    ranking_TN: F32 | None,
    log_odds_TN: F32 | None,
    is_match_TN: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    image_of_T = split.image_of_caption_T.numpy()
    pictures: set[int] = set()
    rows = []
    for caption in shown:
        image = int(image_of_T[caption])
        pictures.add(image)
        row: dict[str, Any] = {
            "caption": split.captions[caption],
            "picture": image,
            "masked_words": words.get(caption, []),
            "attention": looks.get(caption, []),
        }
        if log_odds_TN is not None:
            row["match_probability"] = _sigmoid(log_odds_TN[caption, image])
        if ranking_TN is not None:
            best_texts, best_images = _best(ranking_TN[:, image]), _best(ranking_TN[caption])
            row["best_captions"] = [
                [split.captions[t], bool(is_match_TN[t, image]), _match(log_odds_TN, t, image)] for t in best_texts
            ]
            row["best_pictures"] = [
                [n, bool(is_match_TN[caption, n]), _match(log_odds_TN, caption, n)] for n in best_images
            ]
            pictures.update(best_images)
        rows.append(row)
    files = {str(n): base64.b64encode(split.image_bytes(n)).decode() for n in sorted(pictures)}
    return {"samples": rows, "pictures": files}


def _best(scores: F32) -> list[int]:
    order = np.argsort(-scores, kind="stable")[:_SHOWN]
    return [int(number) for number in order if np.isfinite(scores[number])]


def _match(log_odds_TN: F32 | None, caption: int, image: int) -> float | None:
    """ITM's probability of a pair, where it was scored."""
    return (
        None
        if log_odds_TN is None or not np.isfinite(log_odds_TN[caption, image])
        else _sigmoid(log_odds_TN[caption, image])
    )


def _sigmoid(log_odds: float) -> float:
    return round(float(1 / (1 + np.exp(-float(log_odds)))), 4)


def write_scores(
    run_folder: Path, step: int, results: Mapping[str, SplitScores], *, best: Mapping[str, Any] | None = None
) -> None:
    """Write eval.json (the newest scores; the first split's also stand at the top) and predictions.json.

    Args:
        best: which weights have been the best so far, if they are selected.
    """
    if dist.rank() != 0 or not results:
        return
    headline = next(iter(results))
    content = {
        "step": step,
        "headline_split": headline,
        **results[headline].scores,
        "splits": {name: {"scores": result.scores, "chance": result.chance} for name, result in results.items()},
        **({"best": best} if best else {}),
    }
    write_atomically(run_folder / EVAL_NAME, json.dumps(content, indent=1).encode() + b"\n")
    samples = {name: result.samples for name, result in results.items()}
    if not any(samples.values()):
        return
    content = {"step": step, "splits": samples}
    write_atomically(run_folder / PREDICTIONS_NAME, json.dumps(content).encode() + b"\n")


def forget_best_after(run_folder: Path, step: int) -> None:
    """Take the best weights out of eval.json if they are of a later step: the run goes on from before it."""
    path = run_folder / EVAL_NAME
    if dist.rank() != 0 or not path.is_file():
        return
    content = json.loads(path.read_bytes())
    if content.get("best", {"step": step})["step"] > step:
        del content["best"]
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
