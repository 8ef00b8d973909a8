"""The table of tensor names: this program's, the published checkpoints' and the port's."""

from __future__ import annotations

import pytest
import torch

from bridgetower.interop import names
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS
from tests.interop.models import port_like_config

# One name of each rule, as the published checkpoints have it.
PAIRS = [
    ("text_tower.encoder.embeddings.word_embeddings.weight", "text_transformer.embeddings.word_embeddings.weight"),
    ("text_tower.encoder.encoder.layer.3.output.dense.bias", "text_transformer.encoder.layer.3.output.dense.bias"),
    ("vision_tower.vit.conv1.weight", "vit_model.visual.conv1.weight"),
    ("vision_tower.vit.positional_embedding", "vit_model.visual.positional_embedding"),
    (
        "vision_tower.vit.transformer.resblocks.11.attn.in_proj_weight",
        "vit_model.visual.transformer.resblocks.11.attn.in_proj_weight",
    ),
    ("text_transform.weight", "cross_modal_text_transform.weight"),
    ("modality_embedding.weight", "token_type_embeddings.weight"),
    ("cross_modal.image_norm.bias", "cross_modal_image_layernorm.bias"),
    ("cross_modal.text_bridges.4.norm.weight", "cross_modal_text_link_tower.4.LayerNorm.weight"),
    (
        "cross_modal.text_layers.5.self_attention.query.weight",
        "cross_modal_text_layers.5.attention.self.query.weight",
    ),
    (
        "cross_modal.image_layers.0.cross_attention.norm.bias",
        "cross_modal_image_layers.0.crossattention.output.LayerNorm.bias",
    ),
    ("cross_modal.text_layers.1.feed_forward.expand.bias", "cross_modal_text_layers.1.intermediate.dense.bias"),
    ("cross_modal.text_layers.1.feed_forward.norm.bias", "cross_modal_text_layers.1.output.LayerNorm.bias"),
    ("image_pooler.weight", "cross_modal_image_pooler.dense.weight"),
    ("text_gate.linear.weight", "text_gate.weight"),
    ("heads.mlm.norm.weight", "mlm_score.transform.LayerNorm.weight"),
    ("heads.mlm.bias", "mlm_score.bias"),
    ("heads.itm.classifier.weight", "itm_score.fc.weight"),
    ("heads.itc.image.bias", "itc_image_head.fc.bias"),
    ("heads.itc.temperature", "temperature"),
    ("heads.vqa.classifier.weight", "vqa_classifier.3.weight"),
    ("heads.snli_ve.norm.weight", "snli_classifier.1.weight"),
    ("heads.nlvr2.expand.bias", "nlvr2_classifier.0.bias"),
    ("heads.rank.classifier.bias", "rank_output.bias"),
]
PORTED = {
    "vit_model.visual.conv1.weight": "bridgetower.vision_model.visual.embeddings.patch_embedding.weight",
    "vit_model.visual.positional_embedding": "bridgetower.vision_model.visual.embeddings.position_embedding.weight",
    "vit_model.visual.ln_post.bias": "bridgetower.vision_model.visual.ln_post.bias",
    "text_transformer.encoder.layer.3.output.dense.bias": "bridgetower.text_model.encoder.layer.3.output.dense.bias",
    "token_type_embeddings.weight": "bridgetower.token_type_embeddings.weight",
    "cross_modal_text_transform.weight": "bridgetower.cross_modal_text_transform.weight",
    "mlm_score.bias": "mlm_score.bias",
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_names_are_those_of_the_published_checkpoints(ours, theirs):
    assert names.to_reference(ours) == theirs
    assert names.from_reference(theirs) == ours


@pytest.mark.parametrize("published", PORTED)
def test_names_of_the_port_are_translated_through_the_published_ones(published):
    ours = names.from_reference(published)
    assert ours is not None
    assert names.to_huggingface(ours) == PORTED[published]
    assert names.from_huggingface(PORTED[published]) == ours


def test_every_tensor_of_a_model_has_one_published_name():
    with torch.device("meta"):
        ours = list(BridgeTower(port_like_config(), HEADS).state_dict())
    published = [names.to_reference(name) for name in ours]
    assert None not in published and len(set(published)) == len(ours)
    assert [names.from_reference(name or "") for name in published] == ours


@pytest.mark.parametrize(
    "name",
    [
        "vit_model.positional_embedding",
        "cross_modal_text_layers.x.output.dense.bias",
        "cross_modal_text_layers.1.output.dense.scale",
        "itm_score.weight",
        "nonsense",
    ],
)
def test_a_name_that_is_not_in_the_table_has_no_translation(name):
    assert names.from_reference(name) is None


def test_a_published_name_behind_the_ports_prefix_has_no_translation():
    # The rule for all other names of the vision tower would match it.
    assert names.from_huggingface("bridgetower.vision_model.visual.conv1.weight") is None
    assert names.from_huggingface("bridgetower.vision_model.visual.embeddings.position_embedding.weight") is not None
