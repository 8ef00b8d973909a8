"""Names of a tensor in three places: this program, checkpoints of the published code, and Hugging Face's port.

No tensor is transposed or split between the three. Only the temperature is stored in different ways: with shape (1,) in
this program and () in published checkpoints; Hugging Face's contrastive class stores the logarithm of its inverse.

Source: BridgeTower (arXiv 2206.08657) src/modules/bt_module.py and meter_module.py; transformers 5.23.0,
models/bridgetower/modeling_bridgetower.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

# Both names of a rule have the same placeholders in the same order. <m> is a modality, <n> a layer index, <w> weight or
# bias, <qkv> one of the three projections, <any> the rest of the name. The first rule that matches is taken.
_PLACEHOLDERS = {
    "<m>": "(text|image)",
    "<n>": r"(\d+)",
    "<w>": "(weight|bias)",
    "<qkv>": "(query|key|value)",
    "<any>": "(.+)",
}

_OURS_AND_REFERENCE = [
    ("text_tower.encoder.<any>", "text_transformer.<any>"),
    ("vision_tower.vit.<any>", "vit_model.visual.<any>"),
    ("<m>_gate.linear.<w>", "<m>_gate.<w>"),
    ("<m>_transform.<w>", "cross_modal_<m>_transform.<w>"),
    ("modality_embedding.weight", "token_type_embeddings.weight"),
    ("cross_modal.<m>_norm.<w>", "cross_modal_<m>_layernorm.<w>"),
    ("cross_modal.<m>_bridges.<n>.norm.<w>", "cross_modal_<m>_link_tower.<n>.LayerNorm.<w>"),
    ("cross_modal.<m>_layers.<n>.self_attention.<qkv>.<w>", "cross_modal_<m>_layers.<n>.attention.self.<qkv>.<w>"),
    ("cross_modal.<m>_layers.<n>.self_attention.output.<w>", "cross_modal_<m>_layers.<n>.attention.output.dense.<w>"),
    ("cross_modal.<m>_layers.<n>.self_attention.norm.<w>", "cross_modal_<m>_layers.<n>.attention.output.LayerNorm.<w>"),
    (
        "cross_modal.<m>_layers.<n>.cross_attention.<qkv>.<w>",
        "cross_modal_<m>_layers.<n>.crossattention.self.<qkv>.<w>",
    ),
    (
        "cross_modal.<m>_layers.<n>.cross_attention.output.<w>",
        "cross_modal_<m>_layers.<n>.crossattention.output.dense.<w>",
    ),
    (
        "cross_modal.<m>_layers.<n>.cross_attention.norm.<w>",
        "cross_modal_<m>_layers.<n>.crossattention.output.LayerNorm.<w>",
    ),
    ("cross_modal.<m>_layers.<n>.feed_forward.expand.<w>", "cross_modal_<m>_layers.<n>.intermediate.dense.<w>"),
    ("cross_modal.<m>_layers.<n>.feed_forward.contract.<w>", "cross_modal_<m>_layers.<n>.output.dense.<w>"),
    ("cross_modal.<m>_layers.<n>.feed_forward.norm.<w>", "cross_modal_<m>_layers.<n>.output.LayerNorm.<w>"),
    ("<m>_pooler.<w>", "cross_modal_<m>_pooler.dense.<w>"),
    ("heads.mlm.transform.<w>", "mlm_score.transform.dense.<w>"),
    ("heads.mlm.norm.<w>", "mlm_score.transform.LayerNorm.<w>"),
    ("heads.mlm.decoder.weight", "mlm_score.decoder.weight"),
    ("heads.mlm.bias", "mlm_score.bias"),
    ("heads.itm.classifier.<w>", "itm_score.fc.<w>"),
    ("heads.itc.<m>.<w>", "itc_<m>_head.fc.<w>"),
    ("heads.itc.temperature", "temperature"),
    ("heads.vqa.expand.<w>", "vqa_classifier.0.<w>"),
    ("heads.vqa.norm.<w>", "vqa_classifier.1.<w>"),
    ("heads.vqa.classifier.<w>", "vqa_classifier.3.<w>"),
    ("heads.snli_ve.expand.<w>", "snli_classifier.0.<w>"),
    ("heads.snli_ve.norm.<w>", "snli_classifier.1.<w>"),
    ("heads.snli_ve.classifier.<w>", "snli_classifier.3.<w>"),
    ("heads.nlvr2.expand.<w>", "nlvr2_classifier.0.<w>"),
    ("heads.nlvr2.norm.<w>", "nlvr2_classifier.1.<w>"),
    ("heads.nlvr2.classifier.<w>", "nlvr2_classifier.3.<w>"),
    ("heads.rank.classifier.<w>", "rank_output.<w>"),
]

_VISUAL, _THEIR_VISUAL = "vit_model.visual", "bridgetower.vision_model.visual"
_REFERENCE_AND_HUGGINGFACE = [
    ("text_transformer.<any>", "bridgetower.text_model.<any>"),
    (f"{_VISUAL}.conv1.weight", f"{_THEIR_VISUAL}.embeddings.patch_embedding.weight"),
    (f"{_VISUAL}.class_embedding", f"{_THEIR_VISUAL}.embeddings.class_embedding"),
    (f"{_VISUAL}.positional_embedding", f"{_THEIR_VISUAL}.embeddings.position_embedding.weight"),
    (f"{_VISUAL}.<any>", f"{_THEIR_VISUAL}.<any>"),
    ("cross_modal_<any>", "bridgetower.cross_modal_<any>"),
    ("token_type_embeddings.weight", "bridgetower.token_type_embeddings.weight"),
    ("mlm_score.<any>", "mlm_score.<any>"),
    ("itm_score.<any>", "itm_score.<any>"),
]

HEAD_OF_REFERENCE = {
    "mlm_score.": "mlm",
    "itm_score.": "itm",
    "itc_text_head.": "itc",
    "itc_image_head.": "itc",
    "vqa_classifier.": "vqa",
    "snli_classifier.": "snli_ve",
    "nlvr2_classifier.": "nlvr2",
    "rank_output.": "rank",
}
"""Head of each prefix of tensor names in published checkpoints."""


def to_reference(ours: str) -> str | None:
    """Translate one of this program's tensor names to a published checkpoint's; None if it has no such tensor."""
    return _rename(ours, "ours", "reference")


def from_reference(theirs: str) -> str | None:
    """Translate a published checkpoint's tensor name to this program's; None if it has no such tensor."""
    return _rename(theirs, "reference", "ours")


def to_huggingface(ours: str) -> str | None:
    """Translate this program's tensor name to that of Hugging Face's classes with heads; None if they have none."""
    published = to_reference(ours)
    return published and _rename(published, "reference", "huggingface")


def from_huggingface(theirs: str) -> str | None:
    """Translate a tensor name of Hugging Face's classes with heads to this program's; None if it has none."""
    published = _rename(theirs, "huggingface", "reference")
    return published and from_reference(published)


def _rename(name: str, source: str, target: str) -> str | None:
    renamed = _apply_first_rule(name, source, target)
    # <any> also matches names that another rule of the target side owns. Only a name that translates back is right.
    return renamed if renamed is not None and _apply_first_rule(renamed, target, source) == name else None


def _apply_first_rule(name: str, source: str, target: str) -> str | None:
    for pattern, parts in _compile_rules(source, target):
        match = pattern.fullmatch(name)
        if match:
            groups = iter(match.groups())
            return "".join(next(groups) if part in _PLACEHOLDERS else part for part in parts)
    return None


@lru_cache
def _compile_rules(source: str, target: str) -> Sequence[tuple[re.Pattern[str], list[str]]]:
    """Return a pattern for the source name of each rule, with the target name split at its placeholders."""
    table = _OURS_AND_REFERENCE if "ours" in (source, target) else _REFERENCE_AND_HUGGINGFACE
    is_forward = (source, target) in (("ours", "reference"), ("reference", "huggingface"))
    rules = table if is_forward else [(right, left) for left, right in table]
    split = re.compile(f"({'|'.join(_PLACEHOLDERS)})").split
    return [
        (re.compile("".join(_PLACEHOLDERS.get(part) or re.escape(part) for part in split(old))), split(new))
        for old, new in rules
    ]
