"""The configuration of Hugging Face's port, from and to ours. What one side has no setting for is refused by name.

Source: transformers 5.23.0, models/bridgetower/configuration_bridgetower.py and modeling_bridgetower.py, whose line
numbers stand beside what was read there.
"""

from __future__ import annotations

from typing import Any

from transformers import BridgeTowerConfig, BridgeTowerTextConfig, BridgeTowerVisionConfig

from bridgetower.config.model import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.published_towers import (
    HEAD_WIDTH,
    TOWER_EPS,
    clip_tower,
    roberta_tower,
    why_no_clip,
    why_no_roberta,
)
from bridgetower.model.bridgetower import BridgeTower

_CAPTION_TOKENS = 50
_GELU = "gelu"


def read_config(theirs: BridgeTowerConfig, source: str, layer_norm_eps: float | None) -> ModelConfig:
    """Our configuration of one of theirs.

    Args:
        source: for errors.
        layer_norm_eps: of the cross-modal layers and the MLM head; None takes theirs.

    Raises:
        CheckpointError: it has options that ours has no setting for; all are named.
    """
    unfit = _unfit(theirs)
    if unfit:
        raise CheckpointError(
            f"{source} has options that this program has no setting for: {'; '.join(unfit)}. Such a model would load "
            "and compute something else, so it is refused. Use transformers itself for it."
        )
    text, vision = theirs.text_config, theirs.vision_config
    try:
        return ModelConfig(
            image_size_px=vision.image_size,
            vision=clip_tower(
                patch_size_px=vision.patch_size,
                width=vision.hidden_size,
                num_layers=_num_blocks(vision),
            ),
            text=roberta_tower(
                vocabulary_size=text.vocab_size,
                width=text.hidden_size,
                num_layers=text.num_hidden_layers,
                num_heads=text.num_attention_heads,
                num_positions=text.max_position_embeddings,
                max_tokens=_CAPTION_TOKENS,
                dropout=text.hidden_dropout_prob,
            ),
            # Their cross-modal layers are built from the text tower's configuration (:1133), whatever the other says.
            fusion=FusionConfig(
                width=theirs.hidden_size,
                num_layers=theirs.num_hidden_layers,
                num_heads=text.num_attention_heads,
                dropout=text.hidden_dropout_prob,
                layer_norm_eps=theirs.layer_norm_eps if layer_norm_eps is None else layer_norm_eps,
            ),
            heads=HeadsConfig(mlm_tied=bool(theirs.tie_word_embeddings)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} describes a model that cannot be built: {error}") from error


def _num_blocks(vision: BridgeTowerVisionConfig) -> int:
    return int(vision.num_hidden_layers - bool(vision.remove_last_layer))


def _unfit(theirs: BridgeTowerConfig) -> list[str]:
    text, vision = theirs.text_config, theirs.vision_config
    text_width, blocks = text.hidden_size, _num_blocks(vision)
    # (what must hold, the option with its value, what it would have to be and why)
    facts: list[tuple[bool, str, str]] = [
        _equal(theirs, "share_cross_modal_transformer_layers", True, "ours has one transform for all layers"),
        _equal(theirs, "share_link_tower_layers", False, "ours has a bridge for each layer"),
        _equal(theirs, "link_tower_type", "add", "ours has no bridge that is exactly it"),
        _equal(theirs, "init_layernorm_from_vision_encoder", False, "ours has no norm that starts so"),
        _equal(theirs, "hidden_act", _GELU, "of our MLM head"),
        _equal(theirs, "layer_norm_eps", TOWER_EPS, "of our bridges and first norms"),
        _equal(theirs, "hidden_size", text_width, "as its cross-modal layers have the text tower's width"),
        _equal(text, "hidden_act", _GELU, "of our text tower and cross-modal layers", "text_config."),
        _equal(text, "layer_norm_eps", TOWER_EPS, "of our text tower", "text_config."),
        _equal(text, "intermediate_size", 4 * text_width, "four times the width", "text_config."),
        _equal(text, "type_vocab_size", 1, "as RoBERTa", "text_config."),
        _equal(text, "pad_token_id", 1, "as RoBERTa", "text_config."),
        _equal(text, "is_decoder", False, "ours reads whole texts", "text_config."),
        _equal(text, "add_cross_attention", False, "ours has none in its text tower", "text_config."),
        _equal(
            text,
            "attention_probs_dropout_prob",
            text.hidden_dropout_prob,
            "ours has one dropout, theirs has another hidden_dropout_prob",
            "text_config.",
        ),
        _equal(vision, "layer_norm_eps", TOWER_EPS, "of our vision tower", "vision_config."),
        _equal(vision, "num_channels", 3, "ours reads colour images", "vision_config."),
        _equal(vision, "share_layernorm", True, "ours has one norm for all bridged layers", "vision_config."),
        _equal(vision, "stop_gradient", False, "ours trains its vision tower", "vision_config."),
        (
            isinstance(vision.patch_size, int) and isinstance(vision.image_size, int),
            f"vision_config.patch_size={vision.patch_size} and image_size={vision.image_size}",
            "whole numbers, as ours reads square images of square patches",
        ),
        (
            vision.hidden_size >= HEAD_WIDTH and vision.hidden_size % (vision.hidden_size // HEAD_WIDTH) == 0,
            f"vision_config.hidden_size={vision.hidden_size}",
            f"divisible by its number of heads, hidden_size // {HEAD_WIDTH} (:103)",
        ),
        (
            blocks == text.num_hidden_layers,
            f"vision_config.num_hidden_layers={vision.num_hidden_layers} with remove_last_layer="
            f"{vision.remove_last_layer}",
            f"as many blocks as text_config.num_hidden_layers={text.num_hidden_layers}, because their loop (:1299) "
            "takes block i with text layer i, and ours the last ones of each tower",
        ),
    ]
    return [f"{option}, which has to be {needed}" for holds, option, needed in facts if not holds]


def _equal(config: Any, option: str, needed: Any, reason: str, prefix: str = "") -> tuple[bool, str, str]:
    value = getattr(config, option)
    return value == needed, f"{prefix}{option}={value}", f"{needed} ({reason})"


def why_no_port(model: BridgeTower) -> list[str]:
    """What Hugging Face's port has no option for, a clause each; empty if it can hold this model.

    The epsilon is not among them: it changes numbers in their last digits, which a caller may accept.
    """
    config = model.config
    fusion, text, vision = config.fusion, config.text, config.vision
    reasons = why_no_clip(model) + why_no_roberta(model)
    if fusion.num_bridged != fusion.num_layers or not fusion.num_layers:
        reasons.append(
            f"model.fusion.num_layers={fusion.num_layers} with num_external_layers={fusion.num_external_layers}, and "
            "it has bridged layers only, at least one"
        )
    if fusion.num_bridged > 1 and fusion.bridge != "add":
        reasons.append(f"model.fusion.bridge={fusion.bridge}, and it has add only of ours")
    for field in ("width", "num_heads", "dropout"):
        if getattr(fusion, field) != getattr(text, field):
            reasons.append(
                f"model.fusion.{field}={getattr(fusion, field)} and model.text.{field}={getattr(text, field)}, and it "
                "has one for both"
            )
    if vision.num_layers != text.num_layers:
        reasons.append(
            f"model.vision.num_layers={vision.num_layers} and model.text.num_layers={text.num_layers}, and it pairs "
            "the towers' layers from the first on"
        )
    if "nlvr2" in model.heads:
        reasons.append("its modality embedding has no row for NLVR2's second image")
    return reasons


def write_config(model: BridgeTower, class_name: str) -> BridgeTowerConfig:
    """Their configuration of a model that it can hold."""
    config = model.config
    text = BridgeTowerTextConfig(
        vocab_size=config.text.vocabulary_size,
        hidden_size=config.text.width,
        num_hidden_layers=config.text.num_layers,
        num_attention_heads=config.text.num_heads,
        intermediate_size=4 * config.text.width,
        max_position_embeddings=config.text.num_positions,
        hidden_dropout_prob=config.text.dropout,
        attention_probs_dropout_prob=config.text.dropout,
        layer_norm_eps=TOWER_EPS,
    )
    vision = BridgeTowerVisionConfig(
        hidden_size=config.vision.width,
        num_hidden_layers=config.vision.num_layers,
        patch_size=config.vision.patch_size_px,
        image_size=config.image_size_px,
        layer_norm_eps=TOWER_EPS,
    )
    return BridgeTowerConfig(
        hidden_size=config.fusion.width,
        num_attention_heads=config.fusion.num_heads,
        num_hidden_layers=config.fusion.num_layers,
        layer_norm_eps=TOWER_EPS,
        tie_word_embeddings=config.heads.mlm_tied,
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        architectures=[class_name],
        dtype=str(model.text_pooler.weight.dtype).removeprefix("torch."),
    )
