"""``return_attention`` returns the attention probabilities between the two streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bridgetower.model.bridgetower import BridgeTower
from tests.model.formulas import Formulas, close
from tests.small_models import random_pixels, random_texts, shake, small_config

PAIRS, TOKENS, POSITIONS, HEADS = 3, 9, 10, 4


def model_with(**fusion) -> BridgeTower:
    config = small_config(dropout=0.3)
    model = BridgeTower(replace(config, fusion=replace(config.fusion, **fusion)), ("itm",))
    shake(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def inputs():
    ids, mask = random_texts(PAIRS, TOKENS)
    assert not mask.all()
    return random_pixels(PAIRS), ids, mask


VARIANTS = [{}, {"num_layers": 4, "num_external_layers": 2}, {"num_external_layers": 3}, {"bridge": "cross_attention"}]


@pytest.mark.parametrize("fusion", VARIANTS)
@torch.no_grad()
def test_there_is_one_map_per_layer_and_direction_whose_rows_sum_to_one_and_are_zero_on_padding(fusion, inputs):
    model = model_with(**fusion)
    maps = model(*inputs, return_attention=True).attention
    layers = model.config.fusion.num_layers
    assert [tuple(one.shape) for one in maps.text_to_image] == [(PAIRS, HEADS, TOKENS, POSITIONS)] * layers
    assert [tuple(one.shape) for one in maps.image_to_text] == [(PAIRS, HEADS, POSITIONS, TOKENS)] * layers
    for one in (*maps.text_to_image, *maps.image_to_text):
        assert (one >= 0).all()
        close(one.sum(-1), torch.ones(one.shape[:-1], dtype=one.dtype), 1e-6)
    padding = ~inputs[2]
    for one in maps.image_to_text:
        assert (one.transpose(1, 3)[padding] == 0).all() and (one.transpose(1, 3)[inputs[2]] > 0).all()


@pytest.mark.parametrize("fusion", VARIANTS)
@torch.no_grad()
def test_maps_are_returned_only_on_request_and_change_no_output(fusion, inputs):
    model = model_with(**fusion)
    plain, mapped = model(*inputs), model(*inputs, return_attention=True)
    assert plain.attention is None
    close(mapped.pooled, plain.pooled)
    close(mapped.text_states, plain.text_states)
    close(mapped.image_states, plain.image_states)


@torch.no_grad()
def test_maps_equal_a_softmax_written_out(inputs):
    model = model_with()
    pixels, ids, mask = inputs
    maps = model(*inputs, return_attention=True).attention
    text, image = model.encode_text(ids, mask).states_KBND, model.encode_image(pixels).states_KBND
    formulas = Formulas(model, HEADS, 1e-12)
    everywhere = torch.ones(POSITIONS, dtype=torch.bool)
    for row in range(PAIRS):
        for index in range(3):
            # The input of a layer is the output of the layers before.
            x, y = formulas.fuse("add", list(text[:, row]), list(image[:, row]), mask[row], 3, index)
            if index:
                x = formulas.bridge("add", text[index, row], x, mask[row], f"cross_modal.text_bridges.{index - 1}.")
                y = formulas.bridge("add", image[index, row], y, everywhere, f"cross_modal.image_bridges.{index - 1}.")
            else:
                x = formulas.norm(text[0, row], "cross_modal.text_norm", 1e-5)
                y = formulas.norm(image[0, row], "cross_modal.image_norm", 1e-5)
            for layer_maps, states, mask_of_states, other, other_mask, name in (
                (maps.text_to_image, x, mask[row], y, everywhere, f"cross_modal.text_layers.{index}"),
                (maps.image_to_text, y, everywhere, x, mask[row], f"cross_modal.image_layers.{index}"),
            ):
                queries = formulas.attention(states, states, mask_of_states, f"{name}.self_attention")
                expected = torch.stack(formulas.probabilities(queries, other, other_mask, f"{name}.cross_attention"))
                # Queries of padding are never read.
                close(layer_maps[index][row][:, mask_of_states].double(), expected[:, mask_of_states], 1e-6)


@torch.no_grad()
def test_maps_of_a_model_in_bfloat16_are_float32_and_sum_to_one(inputs):
    model = model_with().bfloat16()
    pixels, ids, mask = inputs
    maps = model(pixels.bfloat16(), ids, mask, return_attention=True).attention
    for one in (*maps.text_to_image, *maps.image_to_text):
        assert one.dtype == torch.float32
        close(one.sum(-1), torch.ones(one.shape[:-1]), 1e-5)


@torch.no_grad()
def test_maps_of_encoded_pairs_equal_those_of_the_whole_forward_pass(inputs):
    model = model_with()
    pixels, ids, mask = inputs
    text, image = model.encode_text(ids, mask), model.encode_image(pixels)
    fused = model.fuse(text.states_KBND, image.states_KBND, mask, return_attention=True)
    whole = model(*inputs, return_attention=True).attention
    assert fused.attention is not None and whole is not None
    for one, other in zip(fused.attention, whole, strict=True):
        for fused_map, whole_map in zip(one, other, strict=True):
            close(fused_map, whole_map)
