"""The configuration of a published checkpoint: read from its tensors' shapes, and written as the published settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bridgetower.config.model import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.errors import CheckpointError
from bridgetower.interop.names import HEAD_OF_REFERENCE
from bridgetower.interop.published_towers import (
    HEAD_WIDTH,
    find_clip_config,
    find_roberta_config,
    list_clip_mismatches,
    list_roberta_mismatches,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS

PUBLISHED_EPS = 1e-12
"""Epsilon of the cross-modal layers and the MLM head: the default of transformers' RobertaConfig, which builds them."""
_PUBLISHED_TEXT_TOKENS = 50
_PUBLISHED_DROPOUT = 0.1
# A model with cross-modal layers and none of these is METER.
_BRIDGE_PREFIXES = tuple(f"cross_modal_{m}_{part}" for m in ("text", "image") for part in ("layernorm", "link_tower"))
_CLASSIFIERS = ("vqa_classifier", "snli_classifier", "nlvr2_classifier")
# Prefixes of tensor names that show what a file is if it is not a published checkpoint, and what to do with it.
_HINT_OF_PREFIX = {
    "bridgetower.": "It has the names of Hugging Face's port. Load it with bridgetower.interop.huggingface.",
    "vision_tower.": "It has this program's own names. Load it with bridgetower.load_model.",
    "module.": "Its names start with 'module.', as DistributedDataParallel saves them. Remove that prefix.",
    "vit_model.patch_embed.": "Its vision tower is a Swin or a ViT of timm. Only those with CLIP's ViT can be read.",
}


def find_heads(names: Iterable[str]) -> list[str]:
    """Return the heads that a checkpoint's tensor names belong to, in the order of ``HEADS``."""
    heads = {head for name in names for prefix, head in HEAD_OF_REFERENCE.items() if name.startswith(prefix)}
    return [head for head in HEADS if head in heads]


@dataclass(frozen=True)
class _Shapes:
    """Shapes of a checkpoint's tensors by name, and where they are from."""

    shapes: Mapping[str, tuple[int, ...]]
    source: str

    def get(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor that every published checkpoint has.

        Raises:
            CheckpointError: there is none with so many dimensions, so this is another file.
        """
        shape = self.shapes.get(name)
        if shape is None or len(shape) != num_dimensions:
            raise self._refuse(name)
        return shape

    def has(self, *prefixes: str) -> bool:
        """Return True if the name of any tensor starts with one of the prefixes."""
        return any(name.startswith(prefixes) for name in self.shapes)

    def count(self, pattern: str) -> int:
        """Count the layers whose index a pattern captures."""
        return len({match[1] for name in self.shapes if (match := re.match(pattern, name))})

    def _refuse(self, missing: str) -> CheckpointError:
        for prefix, hint in _HINT_OF_PREFIX.items():
            if self.has(prefix):
                return CheckpointError(f"{self.source} is no checkpoint of the published BridgeTower or METER. {hint}")
        first_names = ", ".join(list(self.shapes)[:3]) or "none"
        return CheckpointError(
            f"{self.source} is no checkpoint of the published BridgeTower or METER: its {len(self.shapes)} tensors "
            f"({first_names}, ...) have no {missing} with the number of dimensions that such a model has. Give a "
            "checkpoint of the published code."
        )


def read_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a model's configuration from the shapes of a checkpoint's tensors.

    Args:
        tensors: the checkpoint's tensors by their published names; only shapes are read.
        settings: the published code's settings, as the checkpoint holds them. Only what no shape shows is read from
            them, and a setting that is absent has the published value.
        source: where the tensors are from, for error messages.

    Raises:
        CheckpointError: the checkpoint is not the published code's, or its shapes do not show the number of heads.
    """
    shapes = _Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    _check_classifiers(shapes)
    fusion_width = shapes.get("cross_modal_text_pooler.dense.weight", 2)[0]
    vision_width, _, patch_size_px, _ = shapes.get("vit_model.visual.conv1.weight", 4)
    num_patches = shapes.get("vit_model.visual.positional_embedding", 2)[0] - 1
    vocabulary_size, text_width = shapes.get("text_transformer.embeddings.word_embeddings.weight", 2)
    num_positions = shapes.get("text_transformer.embeddings.position_embeddings.weight", 2)[0]
    _check_widths({"vision tower": vision_width, "text tower": text_width, "fusion": fusion_width}, source)
    num_layers = shapes.count(r"cross_modal_text_layers\.(\d+)\.")
    is_meter = num_layers > 0 and not shapes.has(*_BRIDGE_PREFIXES)
    return ModelConfig(
        image_size_px=round(max(num_patches, 1) ** 0.5) * patch_size_px,
        vision=find_clip_config(
            patch_size_px=patch_size_px,
            width=vision_width,
            num_layers=shapes.count(r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),
        ),
        text=find_roberta_config(
            vocabulary_size=vocabulary_size,
            width=text_width,
            num_layers=shapes.count(r"text_transformer\.encoder\.layer\.(\d+)\."),
            num_heads=text_width // HEAD_WIDTH,
            num_positions=num_positions,
            max_tokens=max(3, _get_number(settings, "max_text_len", _PUBLISHED_TEXT_TOKENS)),
            dropout=_PUBLISHED_DROPOUT,
        ),
        fusion=FusionConfig(
            width=fusion_width,
            num_layers=num_layers,
            num_external_layers=num_layers if is_meter else 0,
            num_heads=_get_number(settings, "num_heads", fusion_width // HEAD_WIDTH),
            dropout=_get_number(settings, "drop_rate", _PUBLISHED_DROPOUT),
            layer_norm_eps=PUBLISHED_EPS,
            multi_layer_fusion=shapes.has("text_gate.", "image_gate."),
        ),
        heads=_read_heads(shapes.shapes, fusion_width, is_meter),
    )


def _check_classifiers(shapes: _Shapes) -> None:
    for name in _CLASSIFIERS:
        if f"{name}.0.weight" in shapes.shapes and f"{name}.3.weight" not in shapes.shapes:
            raise CheckpointError(
                f"{shapes.source} has a {name} of one layer (task_head_layers=1), which this program does not have. "
                "Fine-tune with two layers, as published."
            )


def _check_widths(widths: Mapping[str, int], source: str) -> None:
    for part, width in widths.items():
        if width % HEAD_WIDTH:
            raise CheckpointError(
                f"The {part} of {source} has a width of {width}, which does not divide into attention heads of "
                f"{HEAD_WIDTH} channels as published. Give the configuration: "
                "bridgetower.interop.reference.from_reference(path, config=...)."
            )


def _read_heads(shapes: Mapping[str, tuple[int, ...]], fusion_width: int, is_meter: bool) -> HeadsConfig:
    pooled_width = 2 * fusion_width
    classifier = shapes.get("vqa_classifier.0.weight") or shapes.get("snli_classifier.0.weight")
    nlvr2 = shapes.get("nlvr2_classifier.0.weight")
    usual_scale = 1.0 if is_meter else HeadsConfig.classifier_scale
    return HeadsConfig(
        itc_width=shapes.get("itc_text_head.fc.weight", (HeadsConfig.itc_width,))[0],
        num_answers=shapes.get("vqa_classifier.3.weight", (HeadsConfig.num_answers,))[0],
        classifier_scale=classifier[0] / pooled_width if classifier else usual_scale,
        nlvr2_scale=nlvr2[0] / pooled_width if nlvr2 else HeadsConfig.nlvr2_scale,
    )


def _get_number(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a setting in the default's type; the default if it is absent or not a number."""
    value = settings.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(default)(value) if is_number else default


def list_unpublished_options(model: BridgeTower) -> list[str]:
    """List a model's options that the published code cannot build, one clause per option."""
    config = model.config
    fusion, heads = config.fusion, model.heads
    is_meter = fusion.num_layers > 0 and not fusion.num_bridged
    reasons = list_clip_mismatches(model) + list_roberta_mismatches(model)
    if config.text.num_heads * HEAD_WIDTH != config.text.width:
        reasons.append(f"model.text.num_heads={config.text.num_heads}, and RoBERTa's heads have {HEAD_WIDTH} channels")
    if fusion.num_bridged > 1 and fusion.bridge != "add":
        reasons.append(f"model.fusion.bridge={fusion.bridge}, and the published code has only add")
    if fusion.num_external_layers and fusion.num_bridged:
        reasons.append(
            f"model.fusion.num_external_layers={fusion.num_external_layers} of {fusion.num_layers}, and the published "
            "code bridges all layers (BridgeTower) or none (METER)"
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
        # Its head_hidden_scale is one setting for every classifier.
        reasons.append(
            f"model.heads.nlvr2_scale={config.heads.nlvr2_scale}"
            f"{' beside another classifier' if has_classifier else ''}, and the published code has an NLVR2 head only "
            f"alone and with a scale of {nlvr2_scale}"
        )
    return reasons


def write_settings(model: BridgeTower) -> dict[str, Any]:
    """Return the published code's settings of a model, without those of data and training.

    Source: BridgeTower src/config.py.
    """
    config, heads = model.config, model.heads
    fusion = config.fusion
    is_meter = fusion.num_layers > 0 and not fusion.num_bridged
    objectives = ("itm", "mlm", "itc", "itm_itc", "irtr_itm_itc", "vqa", "nlvr2", "irtr", "snli")
    head_of_objective = {"snli": "snli_ve", "irtr": "rank"}
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
        "loss_names": {name: int(head_of_objective.get(name, name) in heads) for name in objectives},
        "task_head_layers": 2,
        "head_hidden_scale": config.heads.nlvr2_scale if "nlvr2" in heads else int(config.heads.classifier_scale),
        "nlvr2_drop_rate": 0.1,
        "vqav2_label_size": config.heads.num_answers,
        "contrastive_hidden_size": config.heads.itc_width,
        "temperature": config.heads.itc_initial_temperature,
    }
