"""The heads, which turn states into the scores of an objective.

Shapes: B pairs, N positions, D width, V vocabulary, C contrastive width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.model import ModelConfig
from bridgetower.model.init import init_weights

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # as published (microsoft/BridgeTower, src/modules/objectives.py)


def linear_in_float32(layer: nn.Linear, states_ND: Tensor) -> Tensor:
    """Return the outputs of a layer, computed in float32 or better, shape (N, outputs).

    In bfloat16, with its 8 significant bits, many pairs would get the same score and could not be ranked.
    """
    dtype = torch.promote_types(states_ND.dtype, torch.float32)
    return F.linear(states_ND.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class MLMHead(nn.Module):
    """Linear, GELU, LN and a decoder: a matrix of its own, as published, or (tied) the text tower's word embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the layers."""
        super().__init__()
        width, vocabulary_size = config.fusion.width, config.text.vocabulary_size
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.fusion.layer_norm_eps)
        self.decoder = None if config.heads.mlm_tied else nn.Linear(width, vocabulary_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, states_ND: Tensor, word_embeddings_VD: Tensor) -> Tensor:
        """Return logits, shape (..., V). Pass masked positions only: V is about 50,000.

        Args:
            states_ND: text states of the cross-modal encoder, shape (..., D).
            word_embeddings_VD: word embeddings of the text tower, which a tied decoder reads.
        """
        matrix_VD = word_embeddings_VD if self.decoder is None else self.decoder.weight
        return F.linear(self.norm(F.gelu(self.transform(states_ND))), matrix_VD, self.bias)


class ITMHead(nn.Module):
    """Two classes of the pooled pair; class 1 is a match."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the layers."""
        super().__init__()
        self.classifier = nn.Linear(2 * config.fusion.width, 2)

    def forward(self, pooled_B2D: Tensor) -> Tensor:
        """Return logits (no match, match), shape (B, 2)."""
        logits: Tensor = self.classifier(pooled_B2D)
        return logits


class ITCHead(nn.Module):
    """Projections of the towers' class tokens, and the learned temperature that divides similarities."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the layers."""
        super().__init__()
        self.text = nn.Linear(config.text.width, config.heads.itc_width)
        self.image = nn.Linear(config.vision.width, config.heads.itc_width)
        # One element: DeepSpeed 0.19.8 refuses parameters without a dimension.
        self.temperature = nn.Parameter(torch.full((1,), config.heads.itc_initial_temperature))

    def embed_text(self, class_BD: Tensor) -> Tensor:
        """Return unit vectors in float32, shape (B, C)."""
        return F.normalize(self.text(class_BD).float(), dim=-1)

    def embed_image(self, class_BD: Tensor) -> Tensor:
        """Return unit vectors in float32, shape (B, C)."""
        return F.normalize(self.image(class_BD).float(), dim=-1)

    def clamped_temperature(self) -> Tensor:
        """Return the temperature within its bounds, in float32, shape (1,).

        The gradient passes the clamp unchanged (straight through), so that a temperature beyond its bounds can return.
        """
        raw = self.temperature.float()
        return raw + (raw.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE) - raw).detach()


class ClassifierHead(nn.Module):
    """Dropout, linear, LN, GELU, linear: VQA, SNLI-VE and NLVR2."""

    def __init__(self, in_features: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        """Build the layers."""
        super().__init__()
        self.dropout = dropout
        self.expand = nn.Linear(in_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits, shape (B, classes), in float32 or better.

        Args:
            pooled: shape (B, in_features): the pooled pair; for NLVR2 the pooled pairs (text, image 1) and (text, image
                2), concatenated.
        """
        inner = self.norm(self.expand(F.dropout(pooled, self.dropout, self.training)))
        return linear_in_float32(self.classifier, F.gelu(inner))


class RankHead(nn.Module):
    """One score of the pooled pair, which ranks candidates in retrieval."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the layers."""
        super().__init__()
        self.classifier = nn.Linear(2 * config.fusion.width, 1)

    def forward(self, pooled_B2D: Tensor) -> Tensor:
        """Return scores, shape (B, 1)."""
        scores: Tensor = self.classifier(pooled_B2D)
        return scores


def _vqa(config: ModelConfig) -> nn.Module:
    pooled_width = 2 * config.fusion.width
    return ClassifierHead(pooled_width, int(pooled_width * config.heads.classifier_scale), config.heads.num_answers)


def _snli_ve(config: ModelConfig) -> nn.Module:
    pooled_width = 2 * config.fusion.width
    return ClassifierHead(pooled_width, int(pooled_width * config.heads.classifier_scale), 3)


def _nlvr2(config: ModelConfig) -> nn.Module:
    pooled_width = 2 * config.fusion.width
    return ClassifierHead(2 * pooled_width, int(pooled_width * config.heads.nlvr2_scale), 2, dropout=0.1)


_HEADS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "mlm": MLMHead,
    "itm": ITMHead,
    "itc": ITCHead,
    "vqa": _vqa,
    "snli_ve": _snli_ve,
    "nlvr2": _nlvr2,
    "rank": RankHead,
}
HEADS = tuple(_HEADS)
"""The names of all heads."""


def build_head(name: str, config: ModelConfig) -> nn.Module:
    """Return a head with its initial weights: N(0, 0.02), biases 0, norms 1 and 0.

    Args:
        name: one of ``HEADS``.
        config: complete (``complete_model_config``).

    Source: arXiv 2206.08657, appendix A, and the published code for what it leaves open.
    """
    head = _HEADS[name](config)
    init_weights(head)
    return head
