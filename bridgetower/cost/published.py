"""Operations of the published step, which saves no work, and of one forward pass as the published model computes it.

Captions are padded, the towers and the cross-modal encoder run once for each objective, MLM computes the logits of
every token, and all of the last layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from bridgetower.config.model import FusionConfig, ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.bridges import bridge_cost
from bridgetower.cost.grids import dense
from bridgetower.cost.layers import LayerCosts
from bridgetower.cost.sizes import (
    check_formula,
    mlp_width_of_text,
    mlp_width_of_vision,
    num_image_positions,
    num_read_states,
)
from bridgetower.cost.towers import CountedVision
from bridgetower.cost.unknown import no_formula
from bridgetower.cost.work import CUDA

PUBLISHED_TOKENS = 50
"""Tokens that the published step pads captions to."""
# Pairs of the micro-batch that ITC compares.
_CONTRASTED_PAIRS = 20
FILE = "bridgetower/cost/published.py"


class ForwardFlops(NamedTuple):
    """Operations of the forward pass of one pair, by part of the model."""

    encode_image: int
    """Vision tower and image transform."""
    encode_text: int
    """Text tower and text transform."""
    fuse: int
    """Bridges, cross-modal layers of both modalities, and poolers."""
    heads: dict[str, int]
    """Each head; MLM's at every token."""


class _Pass(NamedTuple):
    """Operations of the forward pass of one pair through everything but the heads."""

    image_tower: int
    image_transform: int
    text_tower: int
    text_transform: int
    bridges: int
    text_stream: int
    image_stream: int
    poolers: int


def count_forward(
    config: ModelConfig, heads: tuple[str, ...], text_tokens: int, counted_vision: CountedVision | None = None
) -> ForwardFlops:
    """Count the forward pass of one pair, with no work saved.

    Args:
        config: complete.
        text_tokens: length of the caption with its <s> and </s>.
        counted_vision: the vision tower, if its layers have no formula.

    Raises:
        ConfigError: there is no formula for something in the model.
    """
    flops = _count_pass(config, text_tokens, counted_vision)
    return ForwardFlops(
        encode_image=flops.image_tower + flops.image_transform,
        encode_text=flops.text_tower + flops.text_transform,
        fuse=flops.bridges + flops.text_stream + flops.image_stream + flops.poolers,
        heads={name: _head(name, config, text_tokens) for name in heads},
    )


def count_published_step(config: ModelConfig, objectives: ObjectivesConfig) -> dict[str, int]:
    """Count the published step per pair, forward and backward, captions padded to PUBLISHED_TOKENS.

    Args:
        config: complete.

    Returns: operations by component; the components are those of ``StepCost.pieces``.

    Raises:
        ConfigError: there is no formula for something in the model.
    """
    active = objectives.heads
    num_tokens = min(PUBLISHED_TOKENS, config.text.max_tokens)
    flops = _count_pass(config, num_tokens, None)
    # MLM shows the pair's image, ITM an image of its own; MLM reads masked captions, ITM and ITC clean ones.
    num_images = 1 + ("itm" in active)
    num_texts = ("mlm" in active) + ("itm" in active or "itc" in active)
    num_passes = ("mlm" in active) + ("itm" in active)
    # A backward pass costs two forward passes, but pixels need no gradient, and nothing flows back through the last
    # image layer of MLM's pass, because MLM reads texts alone.
    vision_tower = num_images * (3 * flops.image_tower - _patch_embedding(config))
    image_stream = 3 * num_passes * flops.image_stream
    if "mlm" in active and config.fusion.num_layers:
        image_stream -= 2 * _cross_modal_stream(num_image_positions(config), num_tokens, config.fusion.width)
    elif "mlm" in active:  # without cross-modal layers MLM sees no image
        vision_tower -= 2 * flops.image_tower - _patch_embedding(config)
    heads = sum(_head(name, config, num_tokens) for name in active)
    if "itm" in active:
        heads += flops.poolers
    if "itc" in active:
        heads += 2 * _linear(1, config.heads.itc_width, _CONTRASTED_PAIRS)
    return {
        "vision_tower": vision_tower,
        "image_transform": 3 * num_images * flops.image_transform,
        "text_tower": 3 * num_texts * (flops.text_tower + flops.text_transform),
        "bridges": 3 * num_passes * flops.bridges,
        "text_stream": 3 * num_passes * flops.text_stream,
        "image_stream": image_stream,
        "heads": 3 * heads,
    }


def _count_pass(config: ModelConfig, text_tokens: int, counted_vision: CountedVision | None) -> _Pass:
    fusion, text, vision = config.fusion, config.text, config.vision
    if counted_vision is not None:
        positions, image_tower = counted_vision.positions, counted_vision.forward
    else:
        check_formula(vision)
        positions = num_image_positions(config)
        block = _tower_layer(positions, vision.width, mlp_width_of_vision(vision))
        image_tower = _patch_embedding(config) + vision.num_layers * block
    num_bridges = max(0, fusion.num_bridged - 1)  # of each modality; the first layer has plain norms
    bridges = _bridge(fusion, text_tokens, is_image=False) + _bridge(fusion, positions, is_image=True)
    return _Pass(
        image_tower=image_tower,
        image_transform=_transform(config, positions, vision.width, vision.num_layers),
        text_tower=text.num_layers * _tower_layer(text_tokens, text.width, mlp_width_of_text(text)),
        text_transform=_transform(config, text_tokens, text.width, text.num_layers),
        bridges=num_bridges * bridges,
        text_stream=fusion.num_layers * _cross_modal_stream(text_tokens, positions, fusion.width),
        image_stream=fusion.num_layers * _cross_modal_stream(positions, text_tokens, fusion.width),
        poolers=2 * _linear(1, fusion.width, fusion.width),
    )


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(num_queries: int, num_keys: int, width: int) -> int:
    """Return the operations of the two matmuls of attention."""
    return 4 * num_queries * num_keys * width


def _patch_embedding(config: ModelConfig) -> int:
    vision = config.vision
    return _linear(num_image_positions(config) - 1, 3 * vision.patch_size_px**2, vision.width)


def _tower_layer(positions: int, width: int, mlp_width: int) -> int:
    projections = _linear(positions, width, 4 * width) + 2 * _linear(positions, width, mlp_width)
    return projections + _attention(positions, positions, width)


def _transform(config: ModelConfig, positions: int, width: int, num_layers: int) -> int:
    """Return the operations of METER's gate, and of the transform to the fusion width, for the states of one tower."""
    fusion, num_read = config.fusion, num_read_states(config, num_layers)
    gate = 0
    if fusion.multi_layer_fusion:
        gate, num_read = _linear((num_read - 1) * positions, width, width), 1
    return gate + (_linear(num_read * positions, width, fusion.width) if fusion.num_layers else 0)


def _cross_modal_stream(own: int, other: int, width: int) -> int:
    """Return the operations of one layer of one stream.

    Args:
        own: positions of the stream's modality.
        other: positions of the other modality.
    """
    self_attention = _linear(own, width, 4 * width) + _attention(own, own, width)
    cross_attention = _linear(own, width, 2 * width) + _linear(other, width, 2 * width) + _attention(own, other, width)
    return self_attention + cross_attention + 2 * _linear(own, width, 4 * width)


def _bridge(fusion: FusionConfig, positions: int, *, is_image: bool) -> int:
    costs = LayerCosts(element=0, memory=CUDA, dropout=0.0)
    return bridge_cost(fusion, costs, dense(1, positions), is_image=is_image).forward


def _mlm(config: ModelConfig, text_tokens: int) -> int:
    width = config.fusion.width
    return _linear(text_tokens, width, width) + _linear(text_tokens, width, config.text.vocabulary_size)


def _itc(config: ModelConfig, text_tokens: int) -> int:
    return _linear(1, config.text.width + config.vision.width, config.heads.itc_width)


def _pooled_classes(num_classes: int) -> Callable[[ModelConfig, int], int]:
    return lambda config, text_tokens: _linear(1, 2 * config.fusion.width, num_classes)


def _classifier(config: ModelConfig, pooled: int, scale: float, num_classes: int) -> int:
    hidden = int(2 * config.fusion.width * scale)
    return _linear(1, pooled, hidden) + _linear(1, hidden, num_classes)


def _vqa(config: ModelConfig, text_tokens: int) -> int:
    return _classifier(config, 2 * config.fusion.width, config.heads.classifier_scale, config.heads.num_answers)


def _snli_ve(config: ModelConfig, text_tokens: int) -> int:
    return _classifier(config, 2 * config.fusion.width, config.heads.classifier_scale, 3)


def _nlvr2(config: ModelConfig, text_tokens: int) -> int:
    return _classifier(config, 4 * config.fusion.width, config.heads.nlvr2_scale, 2)


_HEADS: Mapping[str, Callable[[ModelConfig, int], int]] = {
    "mlm": _mlm,
    "itm": _pooled_classes(2),
    "itc": _itc,
    "vqa": _vqa,
    "snli_ve": _snli_ve,
    "nlvr2": _nlvr2,
    "rank": _pooled_classes(1),
}


def _head(name: str, config: ModelConfig, text_tokens: int) -> int:
    if name not in _HEADS:
        raise no_formula("head", name, FILE, _HEADS)
    return _HEADS[name](config, text_tokens)
