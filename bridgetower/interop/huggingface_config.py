"""The configuration of Hugging Face's port, translated in both directions; options of one side alone are refused.

Source: transformers 5.23.0, models/bridgetower/configuration_bridgetower.py and modeling_bridgetower.py. Numbers such
as :1108 are lines of the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridgetower.config.model import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop.published_towers import (
    HEAD_WIDTH,
    TOWER_EPS,
    find_clip_config,
    find_roberta_config,
    list_clip_mismatches,
    list_roberta_mismatches,
)
from bridgetower.model.bridgetower import BridgeTower

if TYPE_CHECKING:
    from transformers import BridgeTowerConfig, BridgeTowerVisionConfig

_CAPTION_TOKENS = 50
"""Published maximum of tokens per caption, which the port's configuration does not hold."""
_GELU = "gelu"


def read_config(theirs: BridgeTowerConfig, source: str, layer_norm_eps: float | None) -> ModelConfig:
    """Translate transformers' configuration to this program's.

    Args:
        theirs: transformers' configuration.
        source: where it is from, for error messages.
        layer_norm_eps: epsilon of the cross-modal layers and the MLM head; None takes the one of ``theirs``.

    Raises:
        CheckpointError: it has options that this program has no setting for; all are listed.
    """
    unsupported = _list_unsupported(theirs)
    if unsupported:
        raise CheckpointError(
            f"{source} has options that this program has no setting for: {'; '.join(unsupported)}. Such a model would "
            "load and compute something else. Use transformers itself for it."
        )
    text, vision = theirs.text_config, theirs.vision_config
    try:
        return ModelConfig(
            image_size_px=vision.image_size,
            vision=find_clip_config(
                patch_size_px=vision.patch_size,
                width=vision.hidden_size,
                num_layers=_count_blocks(vision),
            ),
            text=find_roberta_config(
                vocabulary_size=text.vocab_size,
                width=text.hidden_size,
                num_layers=text.num_hidden_layers,
                num_heads=text.num_attention_heads,
                num_positions=text.max_position_embeddings,
                max_tokens=_CAPTION_TOKENS,
                dropout=text.hidden_dropout_prob,
            ),
            # The port builds its cross-modal layers from the text tower's configuration (:1108) and ignores the
            # number of heads and the dropout of its own.
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


def _count_blocks(vision: BridgeTowerVisionConfig) -> int:
    return int(vision.num_hidden_layers - bool(vision.remove_last_layer))


def _list_unsupported(theirs: BridgeTowerConfig) -> list[str]:
    """List the options that this program has no setting for, each with the value that it would need and the reason."""
    text, vision = theirs.text_config, theirs.vision_config
    text_width, num_blocks = text.hidden_size, _count_blocks(vision)
    # Each row: is it supported, the option with its value, what is supported and why.
    checks: list[tuple[bool, str, str]] = [
        _check_equal(theirs, "share_cross_modal_transformer_layers", True, "one transform for all bridged layers"),
        _check_equal(theirs, "share_link_tower_layers", False, "one bridge per layer"),
        _check_equal(theirs, "link_tower_type", "add", "no bridge here computes exactly the others"),
        _check_equal(theirs, "init_layernorm_from_vision_encoder", False, "norms start at 1 and 0"),
        _check_equal(theirs, "hidden_act", _GELU, "activation of the MLM head"),
        _check_equal(theirs, "layer_norm_eps", TOWER_EPS, "epsilon of the bridges and first norms"),
        _check_equal(theirs, "hidden_size", text_width, "cross-modal layers as wide as the text tower"),
        _check_equal(text, "hidden_act", _GELU, "activation of text tower and cross-modal layers", "text_config."),
        _check_equal(text, "layer_norm_eps", TOWER_EPS, "epsilon of the text tower", "text_config."),
        _check_equal(text, "intermediate_size", 4 * text_width, "four times the width", "text_config."),
        _check_equal(text, "type_vocab_size", 1, "as in RoBERTa", "text_config."),
        _check_equal(text, "pad_token_id", 1, "as in RoBERTa", "text_config."),
        _check_equal(text, "is_decoder", False, "no causal mask", "text_config."),
        _check_equal(text, "add_cross_attention", False, "no cross-attention in the text tower", "text_config."),
        _check_equal(
            text,
            "attention_probs_dropout_prob",
            text.hidden_dropout_prob,
            "one dropout, so the same as hidden_dropout_prob",
            "text_config.",
        ),
        _check_equal(vision, "layer_norm_eps", TOWER_EPS, "epsilon of the vision tower", "vision_config."),
        _check_equal(vision, "num_channels", 3, "colour images", "vision_config."),
        _check_equal(vision, "share_layernorm", True, "one norm for all bridged layers", "vision_config."),
        _check_equal(vision, "stop_gradient", False, "the vision tower is trained", "vision_config."),
        (
            isinstance(vision.patch_size, int) and isinstance(vision.image_size, int),
            f"vision_config.patch_size={vision.patch_size} and image_size={vision.image_size}",
            "whole numbers, for square images of square patches",
        ),
        (
            vision.hidden_size >= HEAD_WIDTH and vision.hidden_size % (vision.hidden_size // HEAD_WIDTH) == 0,
            f"vision_config.hidden_size={vision.hidden_size}",
            f"divisible by its number of heads, hidden_size // {HEAD_WIDTH} (modeling_bridgetower.py:110)",
        ),
        (
            num_blocks == text.num_hidden_layers,
            f"vision_config.num_hidden_layers={vision.num_hidden_layers} with remove_last_layer="
            f"{vision.remove_last_layer}",
            f"as many blocks as text_config.num_hidden_layers={text.num_hidden_layers}, because the port pairs block i "
            "with text layer i (modeling_bridgetower.py:1288), and this program pairs the towers' last layers",
        ),
    ]
    return [f"{option}, which has to be {supported}" for is_supported, option, supported in checks if not is_supported]


def _check_equal(config: Any, option: str, needed: Any, reason: str, prefix: str = "") -> tuple[bool, str, str]:
    value = getattr(config, option)
    return value == needed, f"{prefix}{option}={value}", f"{needed} ({reason})"


def list_unported_options(model: BridgeTower) -> list[str]:
    """List a model's options that Hugging Face's port cannot build, one clause per option.

    The epsilon of the cross-modal layers is not listed: it changes only the last digits, which a caller may accept.
    """
    config = model.config
    fusion, text, vision = config.fusion, config.text, config.vision
    reasons = list_clip_mismatches(model) + list_roberta_mismatches(model)
    if fusion.num_bridged != fusion.num_layers or not fusion.num_layers:
        reasons.append(
            f"model.fusion.num_layers={fusion.num_layers} with num_external_layers={fusion.num_external_layers}, and "
            "the port has bridged layers only, at least one"
        )
    if fusion.num_bridged > 1 and fusion.bridge != "add":
        reasons.append(f"model.fusion.bridge={fusion.bridge}, and the port has only add")
    for field in ("width", "num_heads", "dropout"):
        if getattr(fusion, field) != getattr(text, field):
            reasons.append(
                f"model.fusion.{field}={getattr(fusion, field)} and model.text.{field}={getattr(text, field)}, and the "
                "port has one value for both"
            )
    if vision.num_layers != text.num_layers:
        reasons.append(
            f"model.vision.num_layers={vision.num_layers} and model.text.num_layers={text.num_layers}, and the port "
            "pairs the towers' layers from the first on"
        )
    if "nlvr2" in model.heads:
        reasons.append("the head nlvr2, and the port's modality embedding has no row for a second image")
    return reasons


def write_config(model: BridgeTower, class_name: str) -> BridgeTowerConfig:
    """Translate a model's configuration to transformers'.

    Args:
        model: one that the port can build (``list_unported_options`` is empty).
        class_name: transformers' class that the weights are for.
    """
    from transformers import BridgeTowerConfig, BridgeTowerTextConfig, BridgeTowerVisionConfig

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
