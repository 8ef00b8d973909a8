"""Tower weights from real files are loaded completely and compute what they were trained for, or are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

from bridgetower.config.model import ModelConfig
from bridgetower.config.overrides import from_dict, to_dict
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.pretrained import load_tower_weights, resize_positions
from tests.small_models import random_texts, shake, small_config


@pytest.fixture(scope="module", autouse=True)
def clip_models(tmp_path_factory):
    """Register open_clip models whose vision towers have the sizes of small_config, for images of 24 pixels."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 24, "patch_size": 8, "width": 48, "layers": 4, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    for name, quick_gelu, changes in (
        ("small-quickgelu", True, {}),
        ("small-gelu", False, {}),
        ("small-two-heads", True, {"head_width": 24}),
        ("small-pooled", True, {"attentional_pool": True, "attn_pooler_heads": 2}),
    ):
        content = {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": {**vision, **changes}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)


def clip_file(folder, name="small-quickgelu"):
    """Return an open_clip model with random weights, and the path of a file with these weights."""
    model = open_clip.create_model(name)
    shake(model)
    torch.save(model.state_dict(), folder / "clip.pt")
    return model.eval(), str(folder / "clip.pt")


def roberta_folder(folder, kind=RobertaModel, **changes):
    """Save a RoBERTa with the sizes of small_config and random weights to a folder, and return it."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    more = {"intermediate_size": 128, "max_position_embeddings": 20, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    model = kind(RobertaConfig(**{**sizes, **more, **changes}))
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def configured(**changes) -> ModelConfig:
    """Return small_config with changed settings; ``vision__weights`` stands for ``vision.weights``."""
    content = to_dict(small_config())
    for name, value in changes.items():
        *sections, leaf = name.split("__")
        section = content
        for parent in sections:
            section = section[parent]
        section[leaf] = value
    return from_dict(ModelConfig, content)


def loaded(**changes) -> BridgeTower:
    config = configured(**changes)
    model = BridgeTower(config)
    load_tower_weights(model)
    return model.eval()


def assert_refused(message, **changes):
    with pytest.raises(ConfigError, match=message):
        loaded(**changes)


def test_none_leaves_every_weight_as_it_was():
    model = BridgeTower(small_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_tower_weights(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "activation"), [("small-quickgelu", "quick_gelu"), ("small-gelu", "gelu")])
@torch.no_grad()
def test_vision_tower_loaded_from_a_file_computes_what_open_clip_computes(tmp_path, name, activation):
    clip, file = clip_file(tmp_path, name)
    model = loaded(vision__name=name, vision__weights=file, vision__activation=activation)
    clip.visual.proj = None
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model.encode_image(pixels).class_BD, clip.visual(pixels))


@torch.no_grad()
def test_text_tower_loaded_from_a_folder_computes_what_transformers_computes(tmp_path):
    theirs = roberta_folder(tmp_path)
    model = loaded(text__weights=str(tmp_path))
    ids, mask = random_texts(3, 8)
    expected = theirs(ids, mask.long()).last_hidden_state
    torch.testing.assert_close(model.text_tower(ids, mask, 1)[0][mask], expected[mask])


@torch.no_grad()
def test_head_on_top_of_a_text_model_is_left_out(tmp_path):
    theirs = roberta_folder(tmp_path, RobertaForMaskedLM)
    assert any(name.startswith("lm_head.") for name in load_file(tmp_path / "model.safetensors"))
    model = loaded(text__weights=str(tmp_path))
    ids, mask = random_texts(3, 8)
    expected = theirs.roberta(ids, mask.long()).last_hidden_state
    torch.testing.assert_close(model.text_tower(ids, mask, 1)[0][mask], expected[mask])


def test_weights_of_one_tower_leave_the_other_and_the_new_parts_as_they_were(tmp_path):
    roberta_folder(tmp_path)
    config = configured(text__weights=str(tmp_path))
    model = BridgeTower(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_tower_weights(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("text_tower."), name


def test_unknown_clip_model_is_refused_with_the_nearest_names():
    named = {"vision__name": "ViT-B-16-quikgelu", "vision__weights": "openai"}
    assert_refused(
        r"name=ViT-B-16-quikgelu is not a model of open_clip\. The nearest names are: ViT-B-16-quickgelu", **named
    )


def test_unknown_clip_weights_are_refused_with_the_available_ones():
    sizes = dict.fromkeys(("vision__width", "vision__num_heads", "vision__patch_size_px", "vision__num_layers"), 0)
    named = {"vision__name": "ViT-B-16-quickgelu", "vision__weights": "opnai", "image_size_px": 32, **sizes}
    assert_refused(r"model\.vision\.weights=opnai is neither a file nor .*: openai, .* none for\s+random", **named)


def test_sizes_that_are_not_the_named_towers_are_refused():
    for size, message in (
        ({"vision__width": 96}, r"model\.vision\.width=96, but small-quickgelu has 48\. Leave it out"),
        ({"vision__num_heads": 2}, r"model\.vision\.num_heads=2, but small-quickgelu has 3"),
        ({"vision__num_layers": 5}, r"model\.vision\.num_layers=5: small-quickgelu has 4\. Use that many or fewer"),
    ):
        assert_refused(message, vision__name="small-quickgelu", **size)


def test_sizes_that_are_left_out_are_filled_in_from_the_named_tower():
    sizes = dict.fromkeys(("width", "num_layers", "num_heads", "patch_size_px"), 0)
    named = {f"vision__{name}": value for name, value in sizes.items()}
    assert loaded(vision__name="small-quickgelu", **named).config.vision == replace(
        small_config().vision, name="small-quickgelu"
    )


@torch.no_grad()
def test_top_blocks_of_a_named_tower_can_be_left_out(tmp_path):
    # The original METER has 11 of CLIP's 12 blocks.
    clip, file = clip_file(tmp_path)
    model = loaded(vision__name="small-quickgelu", vision__weights=file, vision__num_layers=3)
    del clip.visual.transformer.resblocks[3:]
    clip.visual.proj = None
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model.encode_image(pixels).class_BD, clip.visual(pixels))


def test_weights_for_a_custom_vision_tower_are_refused(tmp_path):
    assert_refused(r"model\.vision\.name=custom\. Set model\.vision\.name", vision__weights=clip_file(tmp_path)[1])


def test_weights_trained_with_the_other_gelu_are_refused_before_they_are_fetched():
    # open_clip would only warn.
    named = {"vision__name": "ViT-B-16", "vision__weights": "openai", "image_size_px": 32}
    sizes = dict.fromkeys(("width", "num_layers", "num_heads", "patch_size_px"), 0)
    assert_refused(
        "Use --model.vision.name=ViT-B-16-quickgelu", **named, **{f"vision__{n}": v for n, v in sizes.items()}
    )


def test_clip_file_that_lacks_a_tensor_is_refused(tmp_path):
    file = clip_file(tmp_path)[1]
    weights = torch.load(file)
    del weights["visual.ln_pre.weight"]
    torch.save(weights, file)
    assert_refused("could not be loaded", vision__name="small-quickgelu", vision__weights=file)


def test_clip_model_whose_norm_comes_after_a_pool_of_another_width_is_refused():
    assert_refused(
        "cannot be bridged: the only norm after its blocks is one of the attention", vision__name="small-pooled"
    )


def test_clip_model_that_is_no_vit_of_open_clip_is_refused(tmp_path):
    config = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "small-resnet.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": config, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "small-resnet.json")
    assert_refused("cannot be bridged: its image tower is a ResNet.*What fits: .*ViT-", vision__name="small-resnet")


def test_missing_text_weights_are_refused_with_the_ways_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused("could not be loaded.*Give a folder on disk", text__weights=str(tmp_path / "none"))


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_text_file_that_lacks_a_tensor_is_refused_instead_of_filled_with_random_numbers(tmp_path):
    roberta_folder(tmp_path)
    edit(tmp_path, lambda weights: weights.pop("encoder.layer.3.output.dense.weight"))
    assert_refused(r"lack 1 tensor\(s\) such as encoder\.layer\.3\.output\.dense\.weight", text__weights=str(tmp_path))


def test_text_file_with_more_layers_than_its_config_says_is_refused(tmp_path):
    roberta_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert_refused(r"beyond their config\.json 16 tensor\(s\) such as encoder\.layer\.4\.", text__weights=str(tmp_path))


def test_text_weights_of_another_size_are_refused(tmp_path):
    roberta_folder(tmp_path)
    assert_refused(
        r"another shape \d+ tensor\(s\) such as embeddings\.Lay", text__weights=str(tmp_path), text__width=64
    )
    assert_refused(r"lack 16 tensor\(s\) such as encoder\.layer\.5\.", text__weights=str(tmp_path), text__num_layers=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, "model.text.num_heads = 4, the configured tower has 2"),
        ({"hidden_act": "relu"}, "activation (not a setting) = relu"),
        ({"layer_norm_eps": 1e-12}, "LayerNorm epsilon (not a setting) = 1e-12"),
        ({"pad_token_id": 0}, "padding id (not a setting) = 0"),
    ],
)
def test_text_weights_that_fit_but_compute_something_else_are_refused(tmp_path, changes, message):
    roberta_folder(tmp_path, **changes)
    assert_refused(re.escape(message), text__weights=str(tmp_path))


# Position tables.


def cubic(distance):
    """Return the kernel of bicubic interpolation with a = -0.75, as in torch and in the published code."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_matrix(old, new):
    """Return the weight of each old position for each new one: corners not aligned, edges repeated, no antialiasing."""
    matrix = np.zeros((new, old))
    for position in range(new):
        centre = (position + 0.5) * old / new - 0.5
        for neighbour in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[position, min(max(neighbour, 0), old - 1)] += cubic(centre - neighbour)
    return matrix


# Grid sides of CLIP's 224 pixels and other sizes, then those of the paper: 224 to 288, 384, 576 (patch 16) and to 294,
# 574 (patch 14), and fine-tuning from 288 to 384 and 576, from 384 to 576, and from 294 to 574.
GRIDS = [(14, 2), (14, 5), (14, 18), (14, 24), (14, 36), (16, 21), (16, 41), (18, 24), (18, 36), (24, 36), (21, 41)]


@pytest.mark.parametrize(("old", "side"), GRIDS)
def test_resized_positions_equal_bicubic_interpolation_written_out(old, side):
    table = torch.randn(1 + old * old, 6, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    matrix = bicubic_matrix(old, side)
    grid = table[1:].reshape(old, old, 6).double().numpy()
    expected = np.einsum("yi,xj,ijd->yxd", matrix, matrix, grid).reshape(side * side, 6)
    resized = resize_positions(table, side)
    assert np.abs(resized[1:].numpy() - expected).max() < 1e-5
    assert torch.equal(resized[0], table[0])  # the class token has no position in the grid


def test_positions_of_the_same_grid_stay_bit_for_bit():
    table = torch.randn(1 + 9, 4)
    assert resize_positions(table, 3) is table


@torch.no_grad()
def test_clip_weights_serve_at_another_resolution_with_their_positions_resized(tmp_path):
    clip, file = clip_file(tmp_path)
    model = loaded(vision__name="small-quickgelu", vision__weights=file, image_size_px=40)
    vit = model.vision_tower.vit
    assert torch.equal(vit.positional_embedding, resize_positions(clip.visual.positional_embedding, 5))
    assert torch.equal(vit.conv1.weight, clip.visual.conv1.weight)
    assert model.encode_image(torch.randn(1, 3, 40, 40)).states_KBND.shape == (3, 1, 26, 40)
