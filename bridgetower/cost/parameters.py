"""The names and shapes of a model's parameters, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bridgetower.config.model import ModelConfig
from bridgetower.cost.sizes import mlp_width_of_vision
from bridgetower.model.init import shapes_alone
from bridgetower.model.known_towers import is_bert, is_known_text, is_known_vision

_PLAIN_HEADS = {"mlm", "itm", "itc"}


def build_shapes(config: ModelConfig, heads: Sequence[str]) -> nn.Module:
    """Build a model on torch's meta device, where parameters have names and shapes, but no memory.

    The plain model has the same parameters as the one that is trained, and needs neither open_clip nor transformers. It
    is built wherever it knows both towers and all heads.

    Args:
        config: complete.
        heads: names from ``bridgetower.model.heads.HEADS``.
    """
    with shapes_alone():
        if _is_plain(config, heads):
            from bridgetower.model.plain import PlainBridgeTower

            return PlainBridgeTower(config, tuple(heads))
        from bridgetower.model.bridgetower import BridgeTower

        return BridgeTower(config, heads)


def _is_plain(config: ModelConfig, heads: Sequence[str]) -> bool:
    """Return whether the plain model can hold this model: a ViT of CLIP's, a RoBERTa, and the pretraining heads."""
    vision, text = config.vision, config.text
    has_vit = is_known_vision(vision.name) and mlp_width_of_vision(vision) == 4 * vision.width
    has_roberta = is_known_text(text.name) and not is_bert(text.name)
    return has_vit and has_roberta and set(heads) <= _PLAIN_HEADS
