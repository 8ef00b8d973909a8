"""What an evaluation is given and what it returns: the model and the split as protocols, and the scores.

Shapes: N images and T captions of the split, R pairs of a forward pass, L tokens, P image positions, M masked tokens,
K bridged layers, D width, C contrastive width, V vocabulary, S image side, Y x X patches.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bridgetower.batch import ImageBatch, TextBatch
from bridgetower.config.run import ObjectivesConfig

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Encoded(Protocol):
    """Encoded images or captions."""

    @property
    def states_KBND(self) -> Tensor:
        """States of the bridged layers, ready for the cross-modal encoder."""

    @property
    def embedding_BC(self) -> Tensor | None:
        """Unit vectors for retrieval by ITC; None without ITC."""


class Scorer(Protocol):
    """The model that is evaluated: a pretraining task."""

    objectives: ObjectivesConfig

    def image_features(self, pixels_N3SS: Tensor) -> Encoded:
        """Encode uint8 images."""

    def text_features(self, ids_TL: Tensor, attention_mask_TL: Tensor) -> Encoded:
        """Encode captions."""

    def match_logits(self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor) -> Tensor:
        """Score encoded pairs by ITM.

        Args:
            image_R: row of ``image_KNPD`` that each caption is paired with.

        Returns: logits, shape (R, 2); column 1 is a match.
        """

    def contrast_temperature(self) -> float:
        """Return ITC's temperature."""

    def masked_logits(
        self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor, index_M: Tensor
    ) -> Tensor:
        """Predict the masked words of encoded pairs.

        Args:
            index_M: flat index r * L + l of each masked token, on the CPU.

        Returns: logits, shape (M, V).
        """

    def word_attention(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor) -> Tensor | None:
        """Return each token's attention over the patches of its image, shape (R, L, Y, X).

        None for a model without cross-modal layers.
        """


class Split(Protocol):
    """The held-out images and captions that a model is evaluated on."""

    name: str
    num_images: int
    num_captions: int
    captions: list[str]
    image_of_caption_T: Tensor
    """Image of each caption; captions stand in the order of their images."""
    image_id_N: Tensor
    """Images with the same id are the same image."""
    tokenizer: Any

    def image_batch(self, first: int, size: int) -> ImageBatch:
        """Return consecutive images."""

    def text_batch(self, first: int, size: int, *, seed: int) -> TextBatch:
        """Return consecutive captions, clean and masked."""

    def image_bytes(self, number: int) -> bytes:
        """Return the file of an image, for the report."""


class ScoringContext(NamedTuple):
    """What every kind of scoring needs: the model, the split, and how the split is read."""

    scorer: Scorer
    """In evaluation mode, on ``device``."""
    split: Split
    batch_size: int
    """Images, captions or pairs of one forward pass."""
    seed: int
    """Seed of the masks and of the random negatives."""
    device: torch.device


class SplitScores(NamedTuple):
    """The scores of one split."""

    scores: dict[str, float]
    """Scores by their names in eval.json: fractions, and losses in nats."""
    chance: dict[str, float]
    """Chance level of each score that has one, under the same name."""
    samples: dict[str, Any]
    """Some captions and images with the model's predictions, for the report. Empty on all ranks but 0."""
