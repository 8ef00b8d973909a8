"""Towers by name have their published shapes, with random weights and without a network."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, CamembertConfig, RobertaConfig, XLMRobertaConfig

from bridgetower.config.model import CUSTOM, FusionConfig, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.named_vits import build_named, complete_vision_config, pixel_statistics
from bridgetower.model.sizes import complete_model_config, padding_id
from bridgetower.model.text_tower import TextTower, complete_text_config, longest_text
from bridgetower.model.vision_tower import VisionTower
from tests.model.formulas import close
from tests.small_models import random_texts, shake, small_config


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", autouse=True)
def more_clip_models(tmp_path_factory):
    """Register small open_clip models with every option of the published ones, and models with other towers of timm."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 24, "patch_size": 8, "width": 48, "layers": 4, "head_width": 16}
    towers = {
        "option-clipa": {**vision, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "option-sines": {**vision, "pos_embed_type": "sin_cos_2d"},
        "option-scales": {**vision, "ls_init_value": 0.1, "patch_dropout": 0.5, "norm_kwargs": {"eps": 1e-3}},
        "option-pooled": {**vision, "attentional_pool": True, "attn_pooler_heads": 2},
        **{f"timm-{name}": {"timm_model_name": name, "image_size": 224} for name in (*NO_PLAIN_VITS, REGISTERS)},
    }
    for name, tower in towers.items():
        content = {"embed_dim": 48, "vision_cfg": tower, "text_cfg": {"context_length": 8, "vocab_size": 32}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)


NO_PLAIN_VITS = ("davit_tiny", "maxvit_tiny_tf_224", "xcit_nano_12_p16_224", "hiera_tiny_224", "beit_base_patch16_224")
REGISTERS = "vit_medium_patch16_reg4_gap_256"  # has four registers and no class token


def vision(name: str, **changes) -> VisionTowerConfig:
    return complete_vision_config(VisionTowerConfig(name=name, **changes))


def text(name, **changes) -> TextTowerConfig:
    return complete_text_config(TextTowerConfig(name=str(name), **changes))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Shapes.


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "patch"),
    [
        ("ViT-B-32", 768, 12, 12, 32),
        ("ViT-B-16-quickgelu", 768, 12, 12, 16),
        ("ViT-L-14", 1024, 24, 16, 14),
        ("ViT-H-14", 1280, 32, 16, 14),
        ("ViT-B-16-SigLIP", 768, 12, 12, 16),
        ("ViT-SO400M-14-SigLIP-384", 1152, 27, 16, 14),
        ("EVA02-L-14", 1024, 24, 16, 14),
        ("PE-Core-T-16-384", 192, 12, 3, 16),
        ("PE-Core-bigG-14-448", 1536, 50, 16, 14),
        ("MobileCLIP-B", 768, 12, 12, 16),
        ("ViTamin-S", 384, 14, 6, 16),
        ("coca_base", 768, 12, 12, 18),
    ],
)
def test_vision_tower_by_name_has_its_published_sizes(name, width, layers, heads, patch):
    found = vision(name)
    assert (found.width, found.num_layers, found.num_heads, found.patch_size_px) == (width, layers, heads, patch)
    with torch.device("meta"):
        states = VisionTower(found, 6 * patch)(torch.zeros(2, 3, 6 * patch, 6 * patch), 3)
    assert [tuple(state.shape) for state in states] == [(2, 37, width)] * 3


@pytest.mark.parametrize(
    ("name", "words", "width", "layers", "positions", "types", "longest", "padding"),
    [
        ("roberta-base", 50_265, 768, 12, 514, 1, 512, 1),
        ("FacebookAI/roberta-large", 50_265, 1024, 24, 514, 1, 512, 1),
        ("distilbert/distilroberta-base", 50_265, 768, 6, 514, 1, 512, 1),
        ("xlm-roberta-base", 250_002, 768, 12, 514, 1, 512, 1),
        ("xlm-roberta-large", 250_002, 1024, 24, 514, 1, 512, 1),
        ("bert-base-uncased", 30_522, 768, 12, 512, 2, 512, 0),
        ("google-bert/bert-base-cased", 28_996, 768, 12, 512, 2, 512, 0),
        ("bert-large-uncased", 30_522, 1024, 24, 512, 2, 512, 0),
    ],
)
def test_text_tower_by_name_has_its_published_sizes(name, words, width, layers, positions, types, longest, padding):
    found = text(name)
    assert (found.vocabulary_size, found.width, found.num_layers) == (words, width, layers)
    assert (found.num_positions, longest_text(found), padding_id(found)) == (positions, longest, padding)
    layer = 4 * (width**2 + width) + 2 * 4 * width**2 + 5 * width + 4 * width
    with torch.device("meta"):
        tower = TextTower(found)
        states = tower(torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.bool), 3)
    total = (words + positions + types) * width + 2 * width + layers * layer
    assert sum(parameter.numel() for parameter in tower.parameters()) == total
    assert [tuple(state.shape) for state in states] == [(2, 7, width)] * 3


COMBINATIONS = [
    ("ViT-B-32", 224, "distilroberta-base", 6),
    ("ViT-L-14", 28, "roberta-base", 12),
    ("ViT-B-16-SigLIP", 96, "roberta-base", 3),
    ("EVA02-B-16", 64, "bert-base-uncased", 3),
    ("PE-Core-T-16-384", 64, "xlm-roberta-base", 3),
]


@pytest.mark.parametrize(("image", "side", "words", "layers"), COMBINATIONS)
@torch.no_grad()
def test_towers_of_unequal_depth_and_width_and_of_any_image_size_are_bridged(image, side, words, layers):
    config = ModelConfig(
        image_size_px=side,
        vision=VisionTowerConfig(name=image),
        text=TextTowerConfig(name=words),
        fusion=FusionConfig(width=64, num_heads=2, num_layers=layers),
    )
    model = BridgeTower(config, ("itm",)).eval()
    ids, mask = random_texts(2, 7)
    pixels = normal(2, 3, side, side)
    encoded_image, encoded_text = model.encode_image(pixels), model.encode_text(ids, mask)
    num_positions = (side // model.config.vision.patch_size_px) ** 2 + 1
    assert encoded_image.states_KBND.shape == (layers, 2, num_positions, 64)
    assert encoded_text.states_KBND.shape == (layers, 2, 7, 64)
    assert encoded_image.class_BD.shape == (2, model.config.vision.width)
    # The bridged states are those of the last tower layers, lowest first.
    for number, state in enumerate(model.vision_tower(pixels, layers)):
        # Matmuls of the same numbers at other addresses may sum in another order.
        expected = model.image_transform(state) + model.modality_embedding.weight[1]
        close(encoded_image.states_KBND[number], expected, tolerance=1e-5)
    output = model(pixels, ids, mask)
    assert output.pooled.shape == (2, 128) and output.pooled.isfinite().all()
    other = model(pixels.flip(0), ids, mask)
    assert (other.pooled - output.pooled).abs().max() > 1e-5


# States equal those of timm, open_clip and transformers.

OF_TIMM = {
    "ViT-B-16-SigLIP": False,
    "EVA02-B-16": True,
    "PE-Core-T-16-384": True,
    "MobileCLIP-B": True,
    "ViTamin-S": False,
    "vit_relpos_medium_patch16_cls_224": True,
    f"timm-{REGISTERS}": False,
}


@pytest.mark.parametrize(("name", "has_class_token"), OF_TIMM.items())
@torch.no_grad()
def test_states_of_timms_towers_are_its_blocks_outputs_normed(name, has_class_token):
    config = vision(name, num_layers=3)
    side = 4 * config.patch_size_px
    tower = VisionTower(config, side).eval()
    torch.nn.init.normal_(tower.vit.norm.weight, mean=1, std=0.3)  # so that leaving the norm out would show
    outputs: list[Tensor] = []
    for layer in tower.vit.blocks:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    pixels = normal(2, 3, side, side)
    last = tower.vit.forward_features(pixels)
    expected, outputs[:] = list(outputs), []
    states = tower(pixels, 2)
    assert len(expected) == 3
    norm = tower.vit.norm
    for state, raw in zip(states, expected[1:], strict=True):
        spread = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        normed = spread * norm.weight + norm.bias
        close(state[:, int(not has_class_token) :], normed, 1e-4)
        registers = 4 if "reg4" in name else 0
        if not has_class_token:
            # The mean of the patches replaces the class token.
            assert state.shape[1] == 1 + registers + 16
            close(state[:, 0], normed[:, registers:].mean(dim=1), 1e-4)
    close(states[-1][:, int(not has_class_token) :], last, 1e-5)


@torch.no_grad()
def test_named_timm_tower_is_the_one_that_open_clip_would_build():
    # With the arguments of open_clip's wrapper, which pools and projects after the tower.
    config = vision("PE-Core-T-16-384")
    theirs = timm.create_model("vit_pe_core_tiny_patch16_384", num_classes=512, global_pool="map", img_size=64).eval()
    tower = VisionTower(config, 64).eval()
    lacking = tower.vit.load_state_dict(theirs.state_dict(), strict=False)
    assert lacking.missing_keys == []
    assert all(key.startswith(("attn_pool.", "head.")) for key in lacking.unexpected_keys)
    pixels = normal(2, 3, 64, 64)
    timm_vit: Any = theirs
    close(tower(pixels, 1)[0], timm_vit.forward_features(pixels), 1e-5)


@pytest.mark.parametrize("name", ["option-clipa", "option-sines", "option-scales", "option-pooled"])
@torch.no_grad()
def test_states_of_open_clips_towers_equal_its_own_with_every_option(name):
    tower = VisionTower(vision(name), 24)
    shake(tower)
    tower.eval()
    pixels = normal(2, 3, 24, 24)
    theirs = build_named(vision(name).name, 24).eval()
    theirs.load_state_dict(tower.vit.state_dict(), strict=True)
    intermediates = theirs.forward_intermediates(
        pixels,
        indices=3,
        normalize_intermediates=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    states = tower(pixels, 3)
    for number, state in enumerate(states):
        close(state[:, :1], intermediates["image_intermediates_prefix"][number], 1e-5)
        close(state[:, 1:], intermediates["image_intermediates"][number], 1e-5)
    tower.train()  # patch dropout is off, so that each image keeps its number of positions
    assert tower(pixels, 1)[0].shape == (2, 10, 48)


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {
    "bert": BertConfig(**SMALL, max_position_embeddings=20),
    "roberta": RobertaConfig(**SMALL, max_position_embeddings=20, hidden_act="relu"),
    "xlm-roberta": XLMRobertaConfig(**SMALL, max_position_embeddings=20, layer_norm_eps=1e-3),
    "camembert": CamembertConfig(**SMALL, max_position_embeddings=20, type_vocab_size=1),
}


def folder_of(kind: str, folder) -> str:
    KINDS[kind].save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_tower_from_a_folder_equals_transformers_hidden_states(kind, tmp_path):
    config = text(folder_of(kind, tmp_path), max_tokens=12)
    tower = TextTower(config)
    shake(tower)
    tower = tower.double().eval()
    theirs = AutoModel.from_config(KINDS[kind], add_pooling_layer=False, attn_implementation="eager").double().eval()
    theirs.load_state_dict(tower.encoder.state_dict(), strict=True)
    ids, mask = random_texts(3, 9)
    ids = ids.masked_fill(~mask, padding_id(config))
    expected = theirs(ids, mask.long(), output_hidden_states=True).hidden_states
    states = tower(ids, mask, 4)
    assert len(states) == 4
    for state, layer in zip(states, expected[-4:], strict=True):
        close(state[mask], layer[mask])


@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", 2), ("xlm-roberta", 2), ("camembert", 2)])
@torch.no_grad()
def test_positions_of_a_roberta_start_after_its_padding_id_and_those_of_a_bert_at_zero(kind, first, tmp_path):
    config = text(folder_of(kind, tmp_path), max_tokens=12)
    tower = TextTower(config)
    shake(tower)
    tower = tower.double().eval()
    assert longest_text(config) == 20 - first
    length = longest_text(config)
    ids = torch.randint(5, 50, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    table = tower.encoder.embeddings.position_embeddings.weight
    rows_read = []
    before = tower(ids[:, :6], mask[:, :6], 1)[0]
    for row in range(20):
        saved = table[row].clone()
        table[row, 0] += 1
        if (tower(ids[:, :6], mask[:, :6], 1)[0] != before).any():
            rows_read.append(row)
        table[row] = saved
    assert rows_read == list(range(first, first + 6))
    assert tower(ids, mask, 1)[0].shape == (1, length, 32)  # the longest text fits


@torch.no_grad()
def test_text_tower_by_name_can_be_built_without_its_last_layers(tmp_path):
    name = folder_of("xlm-roberta", tmp_path)
    whole, cut = (
        TextTower(text(name, max_tokens=12)).eval(),
        TextTower(text(name, max_tokens=12, num_layers=3)).eval(),
    )
    shake(whole)
    kept = {key: value for key, value in whole.state_dict().items() if "layer.3." not in key and "layer.4." not in key}
    cut.load_state_dict(kept, strict=True)
    ids, mask = random_texts(3, 9)
    for one, other in zip(cut(ids, mask, 2), whole(ids, mask, 4)[:2], strict=True):
        close(one[mask], other[mask], 1e-5)


# Every parameter is used.


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-T-16-384", "ViTamin-S", "MobileCLIP-B", f"timm-{REGISTERS}"]
)
def test_every_parameter_of_a_named_vision_tower_gets_a_gradient(name):
    config = vision(name, num_layers=3)
    side = 2 * config.patch_size_px
    small = small_config()
    fusion = replace(small.fusion, num_layers=2)
    model = BridgeTower(replace(small, image_size_px=side, vision=config, fusion=fusion))
    pooled = model(normal(2, 3, side, side), *random_texts(2, 7)).pooled
    (pooled * normal(*pooled.shape, seed=1)).sum().backward()
    gradients = {key: value.grad for key, value in model.vision_tower.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_named_text_tower_gets_a_gradient(kind, tmp_path):
    config = replace(small_config(), text=TextTowerConfig(name=folder_of(kind, tmp_path), max_tokens=12, dropout=0.0))
    model = BridgeTower(config)
    pooled = model(normal(2, 3, 24, 24), *random_texts(2, 7)).pooled
    (pooled * normal(*pooled.shape, seed=1)).sum().backward()
    assert [key for key, value in model.text_tower.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-T-16-384", "coca_base", "ViT-H-14-CLIPA"])
def test_named_vision_towers_have_no_pool_and_no_projection(name):
    with torch.device("meta"):
        names = [key for key, _ in VisionTower(vision(name), 8 * vision(name).patch_size_px).named_parameters()]
    assert not [key for key in names if "pool" in key or "head." in key or key in ("vit.proj", "vit.fc_norm.weight")]


# Every name of open_clip.


@lru_cache
def refusal(name: str) -> str:
    """Return the error message for a tower of this name; empty if it can be bridged."""
    try:
        complete_vision_config(VisionTowerConfig(name=name))
    except ConfigError as error:
        return str(error)
    return ""


PUBLISHED = tuple(open_clip.list_models())
MUST_BE_REFUSED = ("RN", "convnext", "swin", "coca_ViT", "MobileCLIP-S", "MobileCLIP2-S")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_model_of_open_clip_is_bridged_or_refused_with_the_reason_and_with_models_that_fit(name):
    message = refusal(name)
    assert bool(message) == name.startswith(MUST_BE_REFUSED)
    if message:
        assert f"model.vision.name={name} cannot be bridged: " in message
        reason = message.split("cannot be bridged: ")[1].split(".")[0]
        family = {"RN": "ResNet", "conv": "ConvNeXt", "swin": "SwinTransformer", "coca": "attention pool"}
        assert any(word in reason for start, word in family.items() if name.startswith(start)) or "FastVit" in reason
        assert "What fits: open_clip's ViT-*" in message


def test_the_names_that_an_error_suggests_can_be_bridged():
    offered = refusal("RN50").split("e.g. ")[1].rstrip(".").split(" or ")
    assert len(offered) == 2 and not any(refusal(name) for name in offered)
    families = ("ViT-", "EVA", "PE-", "MobileCLIP-B")
    assert not any(refusal(name) for name in PUBLISHED if name.startswith(families) or "-SigLIP" in name)


@pytest.mark.parametrize("name", NO_PLAIN_VITS)
def test_a_tower_of_timm_that_is_no_plain_vit_is_refused_whatever_its_name(name):
    assert f"its image tower is timm's {name}, a " in refusal(f"timm-{name}")


def test_an_unknown_name_is_refused_with_the_nearest_names():
    assert "The nearest names are: ViT-B-32" in refusal("ViT-B32")
    assert "The nearest names are: none; `python -c 'import open_clip" in refusal("zzzz")
    assert "custom takes the sizes from the settings" in refusal("zzzz")


# Text encoders that cannot be bridged.


def assert_refused(message: str, name) -> None:
    with pytest.raises(ConfigError, match=message):
        text(name)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gpt2", "n_layer": 2},
        {"model_type": "deberta-v2", "hidden_size": 32},
        {"model_type": "distilbert"},
        {"model_type": "xlm-roberta-xl"},
        {"model_type": "roberta-prelayernorm"},
    ],
)
def test_folder_of_another_family_is_refused_with_those_that_fit(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    kind = content["model_type"]
    assert_refused(
        rf"is a {kind}, which cannot be bridged here: .*What fits: roberta, xlm-roberta, camembert, bert", tmp_path
    )


def test_folder_of_a_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    assert_refused("is a decoder, which does not see later words. Use an encoder", tmp_path)


def test_folder_with_relative_positions_is_refused(tmp_path):
    content = {"model_type": "bert", "position_embedding_type": "relative_key_query"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_refused("has relative_key_query positions .* Use an encoder with absolute positions", tmp_path)


def test_folder_without_a_configuration_and_a_name_of_the_hub_without_network_are_refused(tmp_path):
    for name in (tmp_path, "somebody/some-roberta-that-is-not-here", "roberta-bse"):
        assert_refused(
            f"model.text.name={name} could not be found: .* Give a folder .*that needs no network: roberta-base", name
        )


def test_a_text_longer_than_the_named_towers_table_is_refused_with_the_length_that_fits():
    with pytest.raises(ConfigError, match=r"max_tokens=513: roberta-base reads at most 512 tokens"):
        text("roberta-base", max_tokens=513)
    with pytest.raises(ConfigError, match=r"max_tokens=513: bert-base-uncased reads at most 512 tokens"):
        text("bert-base-uncased", max_tokens=513)
    assert text("roberta-base", max_tokens=512) and text("bert-base-uncased", max_tokens=512)


# Sizes and pixels.


def test_image_size_that_a_named_towers_patch_does_not_divide_is_refused_with_sizes_that_fit():
    config = ModelConfig(image_size_px=384, vision=VisionTowerConfig(name="ViT-SO400M-14-SigLIP-384"))
    with pytest.raises(ConfigError, match=r"image_size_px=384 is not a multiple of .*=14\. Use 378 or 392"):
        complete_model_config(config)
    for side in (378, 392):
        assert complete_model_config(replace(config, image_size_px=side)).vision.width == 1152


def test_more_bridged_layers_than_a_named_tower_has_are_refused_with_a_number_that_fits():
    config = ModelConfig(
        text=TextTowerConfig(name="distilroberta-base"), fusion=FusionConfig(num_layers=8, num_external_layers=1)
    )
    with pytest.raises(ConfigError, match=r"7 layers, more than the text tower has \(6\).*num_layers=7 or fewer"):
        complete_model_config(config)
    assert complete_model_config(replace(config, fusion=replace(config.fusion, num_layers=7)))
    assert complete_model_config(replace(config, fusion=replace(config.fusion, num_external_layers=2)))


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("ViT-B-16-SigLIP", 0.5, 0.5),
        ("ViT-L-16-SigLIP2-256", 0.5, 0.5),
        ("PE-Core-B-16", 0.5, 0.5),
        ("MobileCLIP-B", 0.0, 1.0),
        ("ViT-H-14-CLIPA", 0.485, 0.229),
        ("EVA02-B-16", 0.48145466, 0.26862954),
        ("ViT-B-32", 0.48145466, 0.26862954),
        (CUSTOM, 0.48145466, 0.26862954),
        ("timm-davit_tiny", 0.48145466, 0.26862954),  # without published weights
    ],
)
def test_pixels_are_normalised_as_the_named_weights_were_trained(name, mean, deviation):
    sizes: dict[str, Any] = {"patch_size_px": 8, "width": 48, "num_layers": 4, "num_heads": 3} if name == CUSTOM else {}
    found = pixel_statistics(VisionTowerConfig(name=name, **sizes))
    assert (found[0][0], found[1][0]) == (mean, deviation) and len(found[0]) == len(found[1]) == 3


def test_a_siglip_model_normalises_pixels_with_one_half():
    config = replace(small_config(), image_size_px=32, vision=VisionTowerConfig(name="ViT-B-16-SigLIP"))
    with torch.device("meta"):
        model = BridgeTower(config)
    model.text_pooler = torch.nn.Linear(
        1, 1
    )  # the only tensor that is not on the meta device: pixels take its type and device
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    close(model.normalize(pixels)[0, 2, 0], torch.tensor([-1.0, -0.6, 1.0]), 1e-6)
