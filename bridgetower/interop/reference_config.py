"""The configuration of a published checkpoint: read from its shapes, and written as the published code's settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bridgetower.config.model import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.errors import CheckpointError
from bridgetower.interop.names import HEAD_OF_REFERENCE
from bridgetower.interop.published_towers import HEAD_WIDTH, clip_tower, roberta_tower, why_no_clip, why_no_roberta
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS

PUBLISHED_EPS = 1e-12
"""Of the cross-modal layers and the MLM head: the default of transformers' RobertaConfig, which they are built from."""
_PUBLISHED_TEXT_TOKENS = 50
# What METER has none of.
_BRIDGED = tuple(f"cross_modal_{m}_{part}" for m in ("text", "image") for part in ("layernorm", "link_tower"))
_CLASSIFIERS = ("vqa_classifier", "snli_classifier", "nlvr2_classifier")
# What tells a checkpoint of something else, and what to do with it.
_OTHER_KINDS = {
    "bridgetower.": "It has the names of Hugging Face's port. Load it with bridgetower.interop.huggingface.",
    "vision_tower.": "It has this program's own names. Load it with bridgetower.load_model.",
    "module.": "Each name starts with 'module.', as DistributedDataParallel saves. Take that away and save it again.",
    "vit_model.patch_embed.": "Its vision tower is a Swin or a ViT of timm. Only those with CLIP's ViT can be read.",
}


def heads_of(names: Iterable[str]) -> list[str]:
    """The heads that a checkpoint has, in the order of ``HEADS``."""
    found = {head for name in names for start, head in HEAD_OF_REFERENCE.items() if name.startswith(start)}
    return [head for head in HEADS if head in found]


def read_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> ModelConfig:
    """The configuration that a checkpoint's shapes tell.

    Args:
        tensors: of the checkpoint.
        settings: of the published code, as the checkpoint holds them; of these only what no shape tells is read, and
            what is not there is as published.
        source: for errors.

    Raises:
        CheckpointError: it is a checkpoint of something else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in _CLASSIFIERS:
        if f"{name}.0.weight" in shapes and f"{name}.3.weight" not in shapes:
            raise CheckpointError(
                f"{source} has a {name} of one layer (task_head_layers=1), which this program does not have. Fine-tune "
                "with two layers, as published."
            )

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dimensions:
            raise _is_something_else(source, shapes, name)
        return found

    fusion_width = shape("cross_modal_text_pooler.dense.weight", 2)[0]
    vision_width, _, patch, _ = shape("vit_model.visual.conv1.weight", 4)
    num_patches = shape("vit_model.visual.positional_embedding", 2)[0] - 1
    vocabulary, text_width = shape("text_transformer.embeddings.word_embeddings.weight", 2)
    num_positions = shape("text_transformer.embeddings.position_embeddings.weight", 2)[0]
    for part, width in {"vision tower": vision_width, "text tower": text_width, "fusion": fusion_width}.items():
        if width % HEAD_WIDTH:
            raise CheckpointError(
                f"The {part} of {source} has a width of {width}, which does not divide into heads of {HEAD_WIDTH} "
                "channels as published. Give its configuration: from_reference(path, config=...)."
            )
    num_layers = _count(shapes, r"cross_modal_text_layers\.(\d+)\.")
    is_meter = num_layers > 0 and not any(name.startswith(_BRIDGED) for name in shapes)
    hidden = shapes.get("vqa_classifier.0.weight") or shapes.get("snli_classifier.0.weight")
    return ModelConfig(
        image_size_px=round(max(num_patches, 1) ** 0.5) * patch,
        vision=clip_tower(
            patch_size_px=patch,
            width=vision_width,
            num_layers=_count(shapes, r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),
        ),
        text=roberta_tower(
            vocabulary_size=vocabulary,
            width=text_width,
            num_layers=_count(shapes, r"text_transformer\.encoder\.layer\.(\d+)\."),
            num_heads=text_width // HEAD_WIDTH,
            num_positions=num_positions,
            max_tokens=max(3, _setting(settings, "max_text_len", _PUBLISHED_TEXT_TOKENS)),
            dropout=0.1,
        ),
        fusion=FusionConfig(
            width=fusion_width,
            num_layers=num_layers,
            num_external_layers=num_layers if is_meter else 0,
            num_heads=_setting(settings, "num_heads", fusion_width // HEAD_WIDTH),
            dropout=_setting(settings, "drop_rate", 0.1),
            layer_norm_eps=PUBLISHED_EPS,
            multi_layer_fusion=any(name.startswith(("text_gate.", "image_gate.")) for name in shapes),
        ),
        heads=HeadsConfig(
            itc_width=shapes.get("itc_text_head.fc.weight", (HeadsConfig.itc_width,))[0],
            num_answers=shapes.get("vqa_classifier.3.weight", (HeadsConfig.num_answers,))[0],
            classifier_scale=hidden[0] / (2 * fusion_width) if hidden else _usual_scale(is_meter),
            nlvr2_scale=shapes["nlvr2_classifier.0.weight"][0] / (2 * fusion_width)
            if "nlvr2_classifier.0.weight" in shapes
            else HeadsConfig.nlvr2_scale,
        ),
    )


def _usual_scale(is_meter: bool) -> float:
    return 1.0 if is_meter else HeadsConfig.classifier_scale


def _count(names: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _setting(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    value = settings.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(default)(value) if is_number else default


def _is_something_else(source: str, shapes: Mapping[str, Sequence[int]], lacking: str) -> CheckpointError:
    for start, hint in _OTHER_KINDS.items():
        if any(name.startswith(start) for name in shapes):
            return CheckpointError(f"{source} is no checkpoint of the published BridgeTower or METER. {hint}")
    named = ", ".join(list(shapes)[:3]) or "none"
    return CheckpointError(
        f"{source} is no checkpoint of the published BridgeTower or METER: among its {len(shapes)} tensors ({named}, "
        f"...) there is no {lacking} of a shape that tells the model. Look at its names and give the right file."
    )


def why_not_published(model: BridgeTower) -> list[str]:
    """What the published code has no setting for, a clause each; empty if it can build this model."""
    config = model.config
    fusion, heads = config.fusion, model.heads
    is_meter = fusion.num_layers > 0 and not fusion.num_bridged
    reasons = why_no_clip(model) + why_no_roberta(model)
    if config.text.num_heads * HEAD_WIDTH != config.text.width:
        reasons.append(f"model.text.num_heads={config.text.num_heads}, and RoBERTa's heads have {HEAD_WIDTH} channels")
    if fusion.num_bridged > 1 and fusion.bridge != "add":
        reasons.append(f"model.fusion.bridge={fusion.bridge}, and the published code has add only")
    if fusion.num_external_layers and fusion.num_bridged:
        reasons.append(
            f"model.fusion.num_external_layers={fusion.num_external_layers} of {fusion.num_layers}, and the published "
            "code has all layers bridged (BridgeTower) or none (METER)"
        )
    widths = {config.text.width, config.vision.width, fusion.width}
    if len(widths) > 1 and ("itc" in heads or fusion.multi_layer_fusion):
        reasons.append("the widths of towers and fusion differ, and its contrastive heads and gates need one width")
    if "mlm" in heads and config.heads.mlm_tied:
        reasons.append("model.heads.mlm_tied=true, and the published MLM head has a matrix of its own")
    scale = config.heads.classifier_scale
    has_classifier = "vqa" in heads or "snli_ve" in heads
    if has_classifier and (scale != int(scale) or (is_meter and scale != 1)):
        reasons.append(
            f"model.heads.classifier_scale={scale}, and the published code reads "
            f"{'1 with METER' if is_meter else 'whole numbers only'}"
        )
    nlvr2_scale = 1.0 if is_meter else HeadsConfig.nlvr2_scale
    if "nlvr2" in heads and (has_classifier or config.heads.nlvr2_scale != nlvr2_scale):
        reasons.append(
            f"it has an NLVR2 head alone, of a scale of {nlvr2_scale}, and here is model.heads.nlvr2_scale="
            f"{config.heads.nlvr2_scale}{' beside another classifier' if has_classifier else ''}"
        )
    return reasons


def write_settings(model: BridgeTower) -> dict[str, Any]:
    """The published code's settings of a model; those of data and training are left out.

    Source: BridgeTower src/config.py.
    """
    config, heads = model.config, model.heads
    fusion = config.fusion
    is_meter = fusion.num_layers > 0 and not fusion.num_bridged
    objectives = ("itm", "mlm", "itc", "itm_itc", "irtr_itm_itc", "vqa", "nlvr2", "irtr", "snli")
    head_of = {"snli": "snli_ve", "irtr": "rank"}
    clip_names = {"ViT-B-32": "CLIP-ViT-B/32", "ViT-B-16": "CLIP-ViT-B/16", "ViT-L-14": "CLIP-ViT-L/14"}
    full_depth = {"ViT-B-32": 12, "ViT-B-16": 12, "ViT-L-14": 24}
    vision = config.vision.name.removesuffix("-quickgelu")
    return {
        "model_type": "METER" if is_meter else "BT",
        "meter_fusion": fusion.multi_layer_fusion,
        "vit": clip_names.get(vision, f"CLIP of {config.vision.num_layers} blocks and width {config.vision.width}"),
        "vit_remove_last": config.vision.num_layers < full_depth.get(vision, 0),
        "vit_layernorm_shared": True,
        "vit_layernorm_init_from_vit": False,
        "image_size": config.image_size_px,
        "patch_size": config.vision.patch_size_px,
        "resolution_before": config.image_size_px,
        "tokenizer": config.text.name,
        "vocab_size": config.text.vocabulary_size,
        "max_text_len": config.text.max_tokens,
        "input_image_embed_size": config.vision.width,
        "input_text_embed_size": config.text.width,
        "hidden_size": fusion.width,
        "num_heads": fusion.num_heads,
        "num_layers": fusion.num_layers,
        "mlp_ratio": 4,
        "drop_rate": fusion.dropout,
        "loss_names": {name: int(head_of.get(name, name) in heads) for name in objectives},
        "task_head_layers": 2,
        "head_hidden_scale": config.heads.nlvr2_scale if "nlvr2" in heads else int(config.heads.classifier_scale),
        "nlvr2_drop_rate": 0.1,
        "vqav2_label_size": config.heads.num_answers,
        "contrastive_hidden_size": config.heads.itc_width,
        "temperature": config.heads.itc_initial_temperature,
    }
