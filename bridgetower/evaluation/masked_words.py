"""MLM on a held-out split: loss and accuracy of masked words, each caption with its own image.

Shapes: T captions of a forward pass, L tokens, M masked tokens, R pairs, K bridged layers, P image positions, D width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from bridgetower import dist
from bridgetower.batch import TextBatch
from bridgetower.evaluation.encode import EncodedImages, merge, select_images
from bridgetower.evaluation.scorer import ScoringContext

Guesses = dict[int, list[dict[str, Any]]]
"""The masked words of each reported caption with the model's best guesses, by the caption's number."""
_NUM_GUESSES = 3


class MaskedWords(NamedTuple):
    """MLM on all captions, or on those of one rank."""

    loss_sum: float
    num_right: int
    num_tokens: int
    guesses: Guesses

    @property
    def scores(self) -> dict[str, float]:
        """Mean loss in nats per token, and accuracy."""
        return {"mlm_loss": self.loss_sum / self.num_tokens, "mlm_accuracy": self.num_right / self.num_tokens}


def score_masked_words(context: ScoringContext, images: EncodedImages, reported: Collection[int]) -> MaskedWords:
    """Predict the masked words of every caption; called on all ranks.

    Args:
        reported: captions whose guesses are kept.
    """
    scorer, split, device, batch_size = context.scorer, context.split, context.device, context.batch_size
    image_of_T = split.image_of_caption_T.numpy()
    loss_sum, num_right, num_tokens = 0.0, 0, 0
    guesses: Guesses = {}
    for first_image, states_KBPD in images.states_by_block.items():
        # Captions stand in the order of their images, so those of a block are consecutive.
        low, high = np.searchsorted(image_of_T, [first_image, first_image + states_KBPD.shape[1]]).tolist()
        for first in range(low, high, batch_size):
            batch = split.text_batch(first, min(batch_size, high - first), seed=context.seed)
            if not len(batch.mlm_index_M):
                continue
            mask_TL = batch.attention_mask_TL.to(device)
            text = scorer.text_features(batch.masked_ids_TL.to(device), mask_TL)
            images_KNPD, image_R = select_images(states_KBPD, image_of_T[first : first + len(mask_TL)] - first_image)
            logits_MV = scorer.masked_logits(text.states_KBND, mask_TL, images_KNPD, image_R, batch.mlm_index_M)
            label_M = batch.mlm_label_M.to(device)
            loss_sum += float(F.cross_entropy(logits_MV, label_M, reduction="sum"))
            num_right += int((logits_MV.argmax(dim=1) == label_M).sum())
            num_tokens += len(label_M)
            _add_guesses(guesses, batch, logits_MV, split.tokenizer, reported)
    by_rank = dist.gather_objects(MaskedWords(loss_sum, num_right, num_tokens, guesses))
    return MaskedWords(
        sum(words.loss_sum for words in by_rank),
        sum(words.num_right for words in by_rank),
        max(1, sum(words.num_tokens for words in by_rank)),
        merge(words.guesses for words in by_rank),
    )


def chance_of_masked_words(vocabulary_size: int) -> dict[str, float]:
    """Return the scores of a model that gives every token of the vocabulary the same probability."""
    return {"mlm_loss": math.log(vocabulary_size), "mlm_accuracy": 1 / vocabulary_size}


def _add_guesses(
    guesses: Guesses, batch: TextBatch, logits_MV: Tensor, tokenizer: Any, reported: Collection[int]
) -> None:
    """Add the masked words of reported captions to ``guesses``, as predictions.json holds them."""
    length = batch.clean_ids_TL.shape[1]
    for row_of_logits, flat_index in enumerate(batch.mlm_index_M.tolist()):
        row, column = divmod(flat_index, length)
        if batch.first + row not in reported:
            continue
        best = logits_MV[row_of_logits].softmax(dim=0).topk(_NUM_GUESSES)
        # Without the first and the last token (<s> and </s>), so that token `column` is word `column - 1`.
        words = batch.clean_ids_TL[row, 1 : int(batch.attention_mask_TL[row].sum()) - 1].tolist()
        guesses.setdefault(batch.first + row, []).append(
            {
                "before": tokenizer.decode(words[: column - 1]),
                "word": tokenizer.decode([words[column - 1]]),
                "after": tokenizer.decode(words[column:]),
                "guesses": [
                    [tokenizer.decode([token]), round(probability, 4)]
                    for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ],
                "is_right": best.indices[0].item() == batch.mlm_label_M[row_of_logits].item(),
            }
        )
