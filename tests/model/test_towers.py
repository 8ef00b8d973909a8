"""The towers are open_clip's ViT and transformers' RoBERTa, layer by layer."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from bridgetower.config.model import CUSTOM, TextTowerConfig, VisionTowerConfig
from bridgetower.model.text_tower import TextTower
from bridgetower.model.vision_tower import VisionTower
from tests.model.formulas import close
from tests.small_models import random_pixels, random_texts, shake, small_config


def vision_tower(**changes) -> VisionTower:
    config = VisionTowerConfig(
        **{"name": CUSTOM, "patch_size_px": 8, "width": 48, "num_layers": 4, "num_heads": 3, **changes}
    )
    tower = VisionTower(config, 24)
    shake(tower)
    return tower.double().eval()


def text_tower() -> TextTower:
    tower = TextTower(small_config().text)
    shake(tower)
    return tower.double().eval()


class WrittenOutQuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-1.702 * x))


@pytest.mark.parametrize(("activation", "layer"), [("quick_gelu", WrittenOutQuickGELU), ("gelu", nn.GELU)])
@torch.no_grad()
def test_vision_tower_equals_open_clips_own_forward_pass(activation, layer):
    tower = vision_tower(activation=activation)
    theirs = VisionTransformer(24, 8, 48, 4, 3, 4.0, act_layer=layer, output_tokens=True).double().eval()
    theirs.proj = None
    theirs.load_state_dict(tower.vit.state_dict(), strict=True)
    pixels = random_pixels(2)
    # Each layer's output, normed by ln_post.
    intermediates = theirs.forward_intermediates(
        pixels, indices=4, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
    )["image_intermediates"]
    states = tower(pixels, 4)
    for state, expected in zip(states, intermediates, strict=True):
        close(state[:, 1:], expected)
    # open_clip returns the class token of the last layer only, separately from the patches.
    class_token, patches = theirs(pixels)
    close(states[-1][:, 0], class_token)
    close(states[-1][:, 1:], patches)


@torch.no_grad()
def test_norm_of_returned_states_does_not_enter_the_next_layer():
    tower, pixels = vision_tower(), random_pixels(2)
    inputs: list[Tensor] = []
    tower.vit.transformer.resblocks[3].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    before = tower(pixels, 4)
    tower.vit.ln_post.weight.add_(1)
    after = tower(pixels, 4)
    close(inputs[0], inputs[1], tolerance=0)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(before, after, strict=True))


@torch.no_grad()
def test_vision_tower_returns_its_last_states_lowest_first():
    tower, pixels = vision_tower(), random_pixels(2)
    every = tower(pixels, 4)
    for number, state in enumerate(tower(pixels, 2)):
        close(state, every[2 + number], tolerance=0)
    # The order is by depth: the first state does not depend on the last layer.
    tower.vit.transformer.resblocks[3].mlp.c_proj.bias[0] += 1
    changed = tower(pixels, 2)
    close(changed[0], every[2], tolerance=0)
    assert (changed[1] - every[3]).abs().max() > 1e-3


@torch.no_grad()
def test_class_token_stands_first_and_patches_row_by_row():
    tower = vision_tower(num_layers=1)
    pixels = random_pixels(1)
    other = pixels.clone()
    other[:, :, 8:16, 16:24] += 1  # the patch in the second row and third column
    first_layer = tower.vit.transformer.resblocks[0]
    first_layer.attn.out_proj.weight.zero_()  # so that no position attends to another
    differs = (tower(pixels, 1)[0] - tower(other, 1)[0]).abs().amax(dim=-1)[0] > 1e-9
    assert differs.nonzero().flatten().tolist() == [1 + 3 + 2]


@torch.no_grad()
def test_text_tower_equals_transformers_hidden_states():
    tower = text_tower()
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=20,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = RobertaModel(config, add_pooling_layer=False).double().eval()
    theirs.load_state_dict(tower.encoder.state_dict(), strict=True)
    ids, mask = random_texts(3, 9)
    # transformers builds its own mask from a two-dimensional one of integers.
    expected = theirs(ids, mask.long(), output_hidden_states=True).hidden_states
    assert len(expected) == 6  # the embeddings first
    states = tower(ids, mask, 3)
    assert len(states) == 3
    for state, layer in zip(states, expected[-3:], strict=True):
        close(state[mask], layer[mask])


@torch.no_grad()
def test_text_positions_count_from_two_over_real_tokens():
    # Reference_spec 1.2: padding index 1 plus the running count, so that the first row that is read is 2.
    tower = text_tower()
    ids, mask = random_texts(1, 6)
    before = tower(ids, mask, 1)[0]
    table = tower.encoder.embeddings.position_embeddings.weight
    for row, is_read in ((0, False), (1, False), (2, True), (7, True), (8, False)):
        saved = table[row].clone()
        table[row, 0] += 1
        assert bool((tower(ids, mask, 1)[0] != before).any()) == is_read
        table[row] = saved


@torch.no_grad()
def test_the_longest_caption_that_the_settings_allow_can_be_encoded():
    config = TextTowerConfig(
        name=CUSTOM, vocabulary_size=50, max_tokens=18, width=32, num_layers=1, num_heads=2, num_positions=20
    )
    ids, mask = random_texts(1, 18)
    assert TextTower(config)(ids, mask, 1)[0].shape == (1, 18, 32)
