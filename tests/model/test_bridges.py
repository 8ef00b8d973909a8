"""The nine bridge forms of the paper's Table 1: values, sizes, initial weights, gradients and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower.config.model import BridgeForm, FusionConfig, ModelConfig
from bridgetower.kernels.layout import padded
from bridgetower.kernels.torch_ops import TorchOps
from bridgetower.model.bridge import build_bridge
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cross_modal import CrossModalEncoder
from tests.model.formulas import Formulas, close
from tests.small_models import PAD_ID, random_pixels, random_texts, shake, small_config

FORMS = get_args(BridgeForm)
WITH_ATTENTION = ("cross_attention", "cross_attention_ffn")
# The key bias adds the same number to all scores of a query, so it cancels in the softmax.
WITHOUT_EFFECT = "key.bias"

# Reference_spec 1.5: parameters of base's ten bridges and of the two norms before the first layer.
TABLE_1 = {
    "add": 18_432,
    "product": 18_432,
    "interpolate": 26_112,
    "gated_interpolate": 11_822_592,
    "linear_concat": 11_822_592,
    "mlp_concat": 35_461_632,
    "cross_attention": 23_642_112,
    "cross_attention_ffn": 70_881_792,
    "linear_residual": 11_822_592,
}


def config_with(form, **changes) -> ModelConfig:
    config = small_config()
    return replace(config, fusion=replace(config.fusion, bridge=form, **changes))


def model_with(form, **changes) -> BridgeTower:
    model = BridgeTower(config_with(form, **changes))
    shake(model)
    return model.double().eval()


def states(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formulas_of(module, fusion: FusionConfig) -> Formulas:
    return Formulas(module, fusion.num_heads, fusion.layer_norm_eps, fusion.bridge_masks_padding)


def test_the_forms_are_the_nine_rows_of_table_1():
    assert tuple(TABLE_1) == FORMS


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_bridge_equals_its_formula(form):
    fusion = config_with(form, layer_norm_eps=1e-3).fusion  # large, so that a wrong epsilon would show
    bridge = build_bridge(fusion, TorchOps()).double().eval()
    shake(bridge)
    tower, cross = states(3, 7, 40, seed=0), states(3, 7, 40, seed=1)
    _, mask = random_texts(3, 7)
    joined = bridge(tower.flatten(0, 1), cross.flatten(0, 1), padded(mask)).unflatten(0, (3, 7))
    formulas = formulas_of(bridge, fusion)
    for row in range(3):
        close(joined[row], formulas.bridge(form, tower[row], cross[row], mask[row], ""))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forward_pass_with_each_bridge_equals_the_formulas(form):
    model = model_with(form)
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    text, image = model.encode_text(ids, mask).states_KBND, model.encode_image(pixels).states_KBND
    output = model(pixels, ids, mask)
    formulas = formulas_of(model, model.config.fusion)
    for row in range(3):
        x, y = formulas.fuse(form, list(text[:, row]), list(image[:, row]), mask[row], 3, 3)
        close(output.text_states[row][mask[row]], x[mask[row]])
        close(output.image_states[row], y)
        close(output.pooled[row].view(2, 40), formulas.pool(x, y))


def parameters_of_one(form: str, width: int) -> int:
    """Return the parameters of one bridge of a form: matrices, biases and norms."""
    norm = 2 * width
    attention = 4 * (width * width + width) + norm
    feed_forward = (4 * width * width + 4 * width) + (4 * width * width + width) + norm
    concat = 2 * width * width + width
    return {
        "add": norm,
        "product": norm,
        "interpolate": width + norm,
        "gated_interpolate": concat + norm,
        "linear_concat": concat + norm,
        "mlp_concat": (2 * width) * (2 * width) + 2 * width + 2 * (2 * width) + concat + norm,
        "cross_attention": attention,
        "cross_attention_ffn": attention + feed_forward,
        "linear_residual": concat + norm,
    }[form]


@pytest.mark.parametrize("form", FORMS)
def test_bridges_of_base_have_the_parameter_count_of_table_1(form):
    with torch.device("meta"):
        encoder = CrossModalEncoder(FusionConfig(bridge=form), TorchOps(), absorb=True)
    layers = (encoder.text_layers, encoder.image_layers)
    num_parameters = count(encoder) - sum(count(part) for part in layers)
    assert num_parameters == 10 * parameters_of_one(form, 768) + 2 * 2 * 768 == TABLE_1[form]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_bridges_have_the_published_initial_weights(form):
    torch.manual_seed(0)
    fusion = replace(small_config().fusion, width=128, num_heads=4, num_layers=2, bridge=form)
    model = BridgeTower(replace(small_config(), fusion=fusion))
    for bridge in (*model.cross_modal.text_bridges, *model.cross_modal.image_bridges):
        for name, parameter in bridge.named_parameters():
            if name == "beta":
                assert (parameter == 0.5).all()
            elif "norm." in name:
                assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
            elif parameter.ndim == 1 or form == "linear_residual":
                assert (parameter == 0).all()
            else:
                spread, mean = parameter.detach().std(), parameter.detach().mean()
                assert abs(spread / 0.02 - 1) < 0.05 and abs(mean) < 1e-3


def test_form_i_starts_as_form_a_bit_for_bit_and_its_correction_learns():
    torch.manual_seed(0)
    added, corrected = BridgeTower(config_with("add")), BridgeTower(config_with("linear_residual"))
    report = corrected.load_state_dict(added.state_dict(), strict=False)
    corrections = [name for name, _ in corrected.named_parameters() if is_correction(name)]
    assert report.missing_keys == corrections and len(corrections) == 2 * 2 * 2
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3).float()
    first, second = added.eval()(pixels, ids, mask), corrected.eval()(pixels, ids, mask)
    assert torch.equal(first.pooled, second.pooled) and torch.equal(first.text_states, second.text_states)
    optimizer = torch.optim.SGD([corrected.get_parameter(name) for name in corrections], lr=1.0)
    (second.pooled * torch.randn_like(second.pooled)).sum().backward()
    optimizer.step()
    assert all(corrected.get_parameter(name).ne(0).any() for name in corrections)
    assert corrected(pixels, ids, mask).pooled.ne(second.pooled).any()


def is_correction(name: str) -> bool:
    return "_bridges." in name and ".linear." in name


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_every_bridge_gets_a_gradient(form):
    model = model_with(form)
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    pooled = model(pixels, ids, mask).pooled
    (pooled * states(*pooled.shape, seed=2)).sum().backward()
    bridges = {name: value for name, value in model.named_parameters() if "_bridges." in name}
    assert len(bridges) == 4 * len(list(build_bridge(model.config.fusion, TorchOps()).parameters()))
    for name, parameter in bridges.items():
        assert parameter.grad is not None, name
        assert name.endswith(WITHOUT_EFFECT) or parameter.grad.abs().max() > 1e-8, name


def longer(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return F.pad(ids, (0, 4), value=PAD_ID), F.pad(mask, (0, 4))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_no_bridge_depends_on_padding(form):
    model = model_with(form)
    (ids, mask), pixels = random_texts(3, 8), random_pixels(3)
    short, long = model(pixels, ids, mask), model(pixels, *longer(ids, mask))
    close(long.text_states[:, :8][mask], short.text_states[mask])
    close(long.image_states, short.image_states)
    close(long.pooled, short.pooled)


@pytest.mark.parametrize("form", WITH_ATTENTION)
@torch.no_grad()
def test_bridges_with_attention_attend_to_padding_without_bridge_masks_padding(form):
    model, masking = model_with(form, bridge_masks_padding=False), model_with(form)
    masking.load_state_dict(model.state_dict(), strict=True)
    (ids, mask), pixels = random_texts(3, 8), random_pixels(3)
    assert (model(pixels, *longer(ids, mask)).pooled - model(pixels, ids, mask).pooled).abs().max() > 1e-3
    # The first text has no padding.
    output = model(pixels, ids, mask)
    difference = (output.pooled - masking(pixels, ids, mask).pooled).abs().amax(dim=-1)
    assert difference[0] < 1e-10 and (difference[1:] > 1e-3).any()
    text, image = model.encode_text(ids, mask).states_KBND, model.encode_image(pixels).states_KBND
    formulas = formulas_of(model, model.config.fusion)
    for row in range(3):
        x, y = formulas.fuse(form, list(text[:, row]), list(image[:, row]), mask[row], 3, 3)
        close(output.pooled[row].view(2, 40), formulas.pool(x, y))


@pytest.mark.parametrize("form", ["add", "cross_attention_ffn"])
@torch.no_grad()
def test_in_float32_neither_padding_nor_other_pairs_change_a_pair_by_more_than_1e_5(form):
    model = model_with(form).float()
    (ids, mask), pixels = random_texts(5, 8), random_pixels(5).float()
    together = model(pixels, ids, mask)
    padded = model(pixels, *longer(ids, mask))
    close(padded.pooled, together.pooled, 1e-5)
    close(padded.text_states[:, :8][mask], together.text_states[mask], 1e-5)
    close(padded.image_states, together.image_states, 1e-5)
    for row in range(5):
        only, length = slice(row, row + 1), int(mask[row].sum())
        alone = model(pixels[only], ids[only, :length], mask[only, :length])
        close(alone.pooled, together.pooled[only], 1e-5)
        close(alone.text_states, together.text_states[only, :length], 1e-5)
        close(alone.image_states, together.image_states[only], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_only_bridges_with_attention_have_dropout_and_only_in_training(form):
    bridge = build_bridge(config_with(form, dropout=0.5).fusion, TorchOps())
    tower, cross = states(2, 5, 40, seed=0).float(), states(2, 5, 40, seed=1).float()
    bridge.eval()
    assert torch.equal(bridge(tower, cross, None), bridge(tower, cross, None))
    bridge.train()
    assert torch.equal(bridge(tower, cross, None), bridge(tower, cross, None)) == (form not in WITH_ATTENTION)
