"""Every named model: its exact number of parameters, a gradient for each, and external layers against formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bridgetower.config.model import CUSTOM, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.config.named_models import MODELS, base, large
from bridgetower.config.run import ObjectivesConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import build_head
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask
from tests.model.formulas import Formulas, close
from tests.small_models import random_batch, random_pixels, random_texts, shake, small_config

# Numbers of parameters, by formulas.


def norm(width: int) -> int:
    return 2 * width


def linear(in_features: int, out_features: int) -> int:
    return in_features * out_features + out_features


def block(width: int) -> int:
    """Return the parameters of a layer of either tower: attention, feed-forward and two norms."""
    return 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + 2 * norm(width)


def vision(width: int, layers: int, patch: int, side: int) -> int:
    """Return those of a vision tower: patches (no bias), class token, positions, norms before and after, blocks."""
    return 3 * patch**2 * width + width + ((side // patch) ** 2 + 1) * width + 2 * norm(width) + layers * block(width)


def text(width: int, layers: int, words: int, positions: int) -> int:
    """Return those of a text tower: words, positions, one token type, a norm, layers; no pooler."""
    return (words + positions + 1) * width + norm(width) + layers * block(width)


def cross_layer(width: int) -> int:
    """Return those of a cross-modal layer: two attentions and a feed-forward, each with its norm."""
    return 8 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + 3 * norm(width)


BRIDGE = {
    "add": norm,
    "product": norm,
    "interpolate": lambda d: d + norm(d),
    "gated_interpolate": lambda d: linear(2 * d, d) + norm(d),
    "linear_concat": lambda d: linear(2 * d, d) + norm(d),
    "mlp_concat": lambda d: linear(2 * d, 2 * d) + norm(2 * d) + linear(2 * d, d) + norm(d),
    "cross_attention": lambda d: 4 * linear(d, d) + norm(d),
    "cross_attention_ffn": lambda d: 4 * linear(d, d) + norm(d) + linear(d, 4 * d) + linear(4 * d, d) + norm(d),
    "linear_residual": lambda d: linear(2 * d, d) + norm(d),
}


def joint(width: int, layers: int = 6, external: int = 0, form: str = "add", gates: bool = False) -> int:
    """Return those of all that comes after towers of the same width."""
    total = 2 * linear(width, width)  # poolers
    if layers:
        total += 2 * linear(width, width) + 2 * width  # transforms and the modality embedding
    bridged = layers - external
    if bridged:
        total += 2 * norm(width) + 2 * (bridged - 1) * BRIDGE[form](width)
    return total + 2 * layers * cross_layer(width) + 2 * linear(width, width) * gates


BASE_TEXT = text(768, 12, 50_265, 514)
BASE_TOWERS = BASE_TEXT + vision(768, 12, 16, 288)

SIZES = {
    "tiny": text(128, 3, 1000, 64) + vision(128, 4, 18, 72) + joint(128, 2),
    "base": BASE_TOWERS + joint(768),
    "large": text(1024, 24, 50_265, 514) + vision(1024, 24, 14, 294) + joint(1024),
    "meter": BASE_TOWERS + joint(768, external=6),
    "meter_fusion": BASE_TOWERS + joint(768, external=6, gates=True),
    "meter_original": BASE_TEXT + vision(768, 11, 16, 288) + joint(768, external=6),
    **{f"base_{form}": BASE_TOWERS + joint(768, form=form) for form in BRIDGE},
    **{f"base_{layers}_layers": BASE_TOWERS + joint(768, layers) for layers in range(13)},
    **{f"base_{6 - external}_internal": BASE_TOWERS + joint(768, external=external) for external in range(7)},
}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_formulas_give_the_published_sizes():
    # Reference_spec 1.8, less the RoBERTa pooler, which nothing reads and which does not exist here.
    assert SIZES["base"] == 326_347_008 - linear(768, 768)
    assert SIZES["large"] == 864_514_048 - linear(1024, 1024)
    assert [cross_layer(width) for width in (768, 1024)] == [9_451_776, 16_796_672]
    # Table 2 of the paper, in millions.
    table_2 = [layers * 2 * cross_layer(768) for layers in (2, 4, 6, 8, 10, 12)]
    assert [total // 10**5 / 10 for total in table_2] == [37.8, 75.6, 113.4, 151.2, 189.0, 226.8]


def test_every_named_model_is_in_the_table_above():
    assert set(SIZES) == set(MODELS)


@pytest.mark.parametrize("name", SIZES)
def test_named_model_has_exactly_its_number_of_parameters(name):
    with torch.device("meta"):
        assert count(BridgeTower(MODELS[name]())) == SIZES[name]


def test_each_row_of_table_2_adds_two_cross_modal_layers_and_their_bridges():
    sizes = [SIZES[f"base_{layers}_layers"] for layers in range(13)]
    steps = [higher - lower for lower, higher in pairwise(sizes)]
    # The first layer comes with transforms, modality embedding and norms.
    assert steps[0] == 2 * 9_451_776 + 1_181_184 + 1_536 + 2 * 1_536
    assert set(steps[1:]) == {2 * 9_451_776 + 2 * 1_536}


def published_total(config: ModelConfig) -> int:
    """Return the parameters of a published pretraining checkpoint, unused ones included: reference_spec 1.8 and 1.9."""
    width = config.fusion.width
    clip_text_width = {768: 512, 1024: 768}[width]
    unused_clip_text = 77 * clip_text_width + norm(clip_text_width)
    pooler, temperature, position_ids = linear(width, width), 1, 0  # position_ids is a buffer
    with torch.device("meta"):
        model = BridgeTower(config, ("mlm", "itm"))
    return count(model) + pooler + unused_clip_text + temperature + position_ids


@pytest.mark.parametrize(("preset", "total"), [(base, 365_636_444), (large, 917_152_092)])
def test_model_with_its_pretraining_heads_has_the_published_total_without_unused_parameters(preset, total):
    assert published_total(preset()) == total


# Every parameter gets a gradient, so that none is stored and reduced over ranks for nothing.


def scaled_down(config: ModelConfig) -> ModelConfig:
    """Return the variant with towers of 24 channels, for the batches of small_models."""
    return replace(
        config,
        image_size_px=24,
        vision=VisionTowerConfig(
            name=CUSTOM, patch_size_px=8, width=24, num_heads=2, num_layers=config.vision.num_layers or 12
        ),
        text=TextTowerConfig(
            name=CUSTOM,
            vocabulary_size=50,
            max_tokens=12,
            width=24,
            num_layers=config.text.num_layers or 12,
            num_heads=2,
            num_positions=20,
            dropout=0.0,
        ),
        fusion=replace(config.fusion, width=24, num_heads=2, dropout=0.0),
    )


# What is added to all inputs of a softmax cancels: attention's key bias (added to all scores of a query) and the bias
# of METER's gate (added to a channel of all layers). Their gradient is zero but for rounding. The published code has
# both.
WITHOUT_EFFECT = ("key.bias", "_gate.linear.bias")


def is_without_effect(name: str) -> bool:
    return name.endswith(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_gets_a_gradient_from_mlm_and_itm(name):
    objectives = ObjectivesConfig(mlm=True, itm=True)
    model = BridgeTower(scaled_down(MODELS[name]()), objectives.heads)
    shake(model)
    loss, _ = PretrainTask(model, objectives)(random_batch())
    loss.backward()
    gradients = {parameter: value.grad for parameter, value in model.named_parameters()}
    assert [parameter for parameter, gradient in gradients.items() if gradient is None] == []
    moved = [
        parameter for parameter, gradient in gradients.items() if gradient is not None and gradient.abs().max() > 1e-7
    ]
    assert [parameter for parameter in gradients if parameter not in moved and not is_without_effect(parameter)] == []


# External layers, METER and no layers at all.


def small_with(**fusion) -> BridgeTower:
    config = small_config()
    model = BridgeTower(replace(config, fusion=replace(config.fusion, **fusion)))
    shake(model)
    return model.double().eval()


def raw_states(model: BridgeTower, ids: Tensor, mask: Tensor, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the raw states of all layers of both towers, lowest first."""
    return model.text_tower(ids, mask, 5), model.vision_tower(pixels, 4)


def formulas_of(model: BridgeTower) -> Formulas:
    return Formulas(model, model.config.fusion.num_heads, model.config.fusion.layer_norm_eps)


def check_against_formulas(model: BridgeTower, texts: list[Tensor], images: list[Tensor], bridged: int) -> None:
    """Compare the whole forward pass with the formulas, given raw states of the tower layers that are read."""
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    output = model(pixels, ids, mask)
    formulas = formulas_of(model)
    modality, layers = formulas.weights["modality_embedding.weight"], model.config.fusion.num_layers
    for row in range(3):
        row_texts = [formulas.linear(state[row], "text_transform") + modality[0] for state in texts]
        row_images = [formulas.linear(state[row], "image_transform") + modality[1] for state in images]
        x, y = formulas.fuse("add", row_texts, row_images, mask[row], bridged, layers)
        close(output.text_states[row][mask[row]], x[mask[row]])
        close(output.image_states[row], y)
        close(output.pooled[row].view(2, -1), formulas.pool(x, y))


@pytest.mark.parametrize(("layers", "external"), [(4, 1), (4, 3), (6, 2), (2, 1), (3, 0), (1, 0)])
@torch.no_grad()
def test_internal_layers_are_bridged_to_the_last_tower_layers_and_external_ones_follow(layers, external):
    model = small_with(num_layers=layers, num_external_layers=external)
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    texts, images = raw_states(model, ids, mask, pixels)
    bridged = layers - external
    check_against_formulas(model, texts[-bridged:], images[-bridged:], bridged)


@pytest.mark.parametrize("layers", [1, 3, 6])
@torch.no_grad()
def test_meter_reads_the_last_layers_without_a_norm(layers):
    model = small_with(num_layers=layers, num_external_layers=layers)
    assert not [name for name, _ in model.named_parameters() if "_bridges" in name or "l.text_norm" in name]
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    texts, images = raw_states(model, ids, mask, pixels)
    check_against_formulas(model, texts[-1:], images[-1:], 0)


def gated_sum(formulas: Formulas, layers: list[Tensor], name: str) -> Tensor:
    """Return f_L + sum over k < L of softmax_k(W f_k + b) * f_k, for one pair."""
    scores = [torch.exp(formulas.linear(layer, name)) for layer in layers[:-1]]
    total = sum(scores[1:], start=scores[0])
    fused = layers[-1]
    for score, layer in zip(scores, layers[:-1], strict=True):
        fused = fused + score / total * layer
    return fused


@torch.no_grad()
def test_meters_multi_layer_fusion_adds_a_gated_sum_of_lower_layers_to_the_last_before_the_transform():
    model = small_with(num_layers=3, num_external_layers=3, multi_layer_fusion=True)
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    texts, images = raw_states(model, ids, mask, pixels)
    formulas = formulas_of(model)
    fused_texts = torch.stack(
        [gated_sum(formulas, [layer[row] for layer in texts], "text_gate.linear") for row in range(3)]
    )
    fused_images = torch.stack(
        [gated_sum(formulas, [layer[row] for layer in images], "image_gate.linear") for row in range(3)]
    )
    check_against_formulas(model, [fused_texts], [fused_images], 0)
    # ITC reads the last layers without the gated sum.
    close(model.encode_text(ids, mask).class_BD, texts[-1][:, 0])
    close(model.encode_image(pixels).class_BD, images[-1][:, 0])


@torch.no_grad()
def test_without_cross_modal_layers_the_poolers_read_the_towers_class_tokens_unchanged():
    config = small_config()
    config = replace(
        config,
        vision=replace(config.vision, width=32, num_heads=2),
        fusion=replace(config.fusion, width=32, num_layers=0),
    )
    model = BridgeTower(config)
    shake(model)
    model = model.double().eval()
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {"text_tower", "vision_tower", "text_pooler", "image_pooler"}
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    text_states, image_states = model.text_tower(ids, mask, 1)[0], model.vision_tower(pixels, 1)[0]
    output = model(pixels, ids, mask)
    close(output.text_states, text_states)
    close(output.image_states, image_states)
    formulas = formulas_of(model)
    for row in range(3):
        close(output.pooled[row].view(2, 32), formulas.pool(text_states[row], image_states[row]))
    assert model(pixels, ids, mask, return_attention=True).attention == ([], [])


def test_original_meter_leaves_out_the_last_visual_block_and_norms_the_eleventh():
    config = replace(small_config(), vision=replace(small_config().vision, num_layers=3))
    with torch.no_grad():
        whole, cut = BridgeTower(small_config()).double().eval(), BridgeTower(config).double().eval()
        shake(whole)
        kept = {k: v for k, v in whole.vision_tower.state_dict().items() if "resblocks.3." not in k}
        cut.vision_tower.load_state_dict(kept, strict=True)
        pixels = random_pixels(2)
        for one, other in zip(cut.vision_tower(pixels, 2), whole.vision_tower(pixels, 3)[:2], strict=True):
            close(one, other)
    with torch.device("meta"):
        assert len(BridgeTower(MODELS["meter_original"]()).vision_tower.vit.transformer.resblocks) == 11


@pytest.mark.parametrize("name", SIZES)
def test_completing_a_named_model_twice_changes_nothing(name):
    once = complete_model_config(MODELS[name]())
    assert complete_model_config(once) == once


def test_vqa_model_has_the_published_size():
    # Reference_spec 1.8 counts the pooler, CLIP's unused text parameters and the temperature, but no pretraining head,
    # at the image size of pretraining.
    for preset, total in ((base, 340_730_682), (large, 885_795_130)):
        config = complete_model_config(preset())
        with torch.device("meta"):
            without_heads = (
                published_total(config) - count(build_head("mlm", config)) - count(build_head("itm", config))
            )
            assert without_heads + count(build_head("vqa", config)) == total
