"""The heads: what each computes, its size and its initial weights (reference_spec 1.7)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bridgetower.config.model import HeadsConfig, ModelConfig, TextTowerConfig
from bridgetower.config.named_models import base
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS, build_head
from bridgetower.model.sizes import complete_model_config
from tests.model.formulas import close, gelu
from tests.small_models import random_pixels, random_texts, shake, small_config

D, WORDS = 40, 50  # of small_config


def config_with(**heads) -> ModelConfig:
    return replace(small_config(), heads=HeadsConfig(**{"itc_width": 12, "num_answers": 7, **heads}))


def equal_widths(**heads) -> ModelConfig:
    """Return small_config with a text tower as wide as the cross-modal layers."""
    config = small_config()
    config = replace(config, text=replace(config.text, width=D, num_heads=4))
    return replace(config, heads=HeadsConfig(**heads))


def head_of(name: str, config: ModelConfig | None = None, **heads):
    head = build_head(name, config or config_with(**heads))
    shake(head)
    return head.double().eval(), dict(head.double().named_parameters())


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x: Tensor, weights, name: str) -> Tensor:
    return torch.einsum("nd,ed->ne", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def norm(x: Tensor, weights, name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def test_names_of_the_heads():
    assert HEADS == ("mlm", "itm", "itc", "vqa", "snli_ve", "nlvr2", "rank")


# Each head equals its formula.


@torch.no_grad()
def test_mlm_head_equals_its_formula_and_has_its_own_decoder():
    head, weights = head_of("mlm")
    x = states(5, D)
    inner = norm(gelu(linear(x, weights, "transform")), weights, "norm", 1e-12)
    expected = inner @ weights["decoder.weight"].T + weights["bias"]
    close(head(x, states(WORDS, D, seed=1)), expected)
    assert set(weights) == {"transform.weight", "transform.bias", "norm.weight", "norm.bias", "decoder.weight", "bias"}


@torch.no_grad()
def test_tied_mlm_head_has_no_decoder_and_uses_the_word_embeddings():
    head, weights = head_of("mlm", equal_widths(mlm_tied=True))
    x, words = states(5, D), states(WORDS, D, seed=1)
    inner = norm(gelu(linear(x, weights, "transform")), weights, "norm", 1e-12)
    close(head(x, words), inner @ words.T + weights["bias"])
    assert set(weights) == {"transform.weight", "transform.bias", "norm.weight", "norm.bias", "bias"}


@torch.no_grad()
def test_itm_and_rank_heads_are_linear_on_the_pooled_pair():
    for name, classes in (("itm", 2), ("rank", 1)):
        head, weights = head_of(name)
        pooled = states(5, 2 * D)
        assert head(pooled).shape == (5, classes)
        close(head(pooled), linear(pooled, weights, "classifier"))


@torch.no_grad()
def test_itc_head_projects_each_towers_class_token_to_the_unit_sphere():
    head, weights = head_of("itc")
    for embed, name, width in ((head.embed_text, "text", 32), (head.embed_image, "image", 48)):
        token = states(5, width)
        projected = linear(token, weights, name)
        expected = projected / (projected**2).sum(-1, keepdim=True).sqrt()
        assert embed(token).dtype == torch.float32
        close(embed(token).double(), expected, 1e-6)


@pytest.mark.parametrize(("raw", "expected"), [(0.07, 0.07), (0.9, 0.5), (-1.0, 0.001), (1e-4, 0.001)])
def test_temperature_is_clamped_and_its_gradient_passes_the_clamp(raw, expected):
    head: Any = build_head("itc", config_with())
    torch.nn.init.constant_(head.temperature, raw)
    used = head.clamped_temperature()
    assert used.item() == pytest.approx(expected, rel=1e-4)
    used.sum().backward()
    assert head.temperature.grad.item() == 1


@pytest.mark.parametrize(
    ("name", "in_features", "hidden", "classes"),
    [("vqa", 2 * D, 4 * D, 7), ("snli_ve", 2 * D, 4 * D, 3), ("nlvr2", 4 * D, 3 * D, 2)],
)
@torch.no_grad()
def test_classifiers_are_linear_norm_gelu_linear(name, in_features, hidden, classes):
    head, weights = head_of(name)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    assert shapes["expand.weight"] == (hidden, in_features) and shapes["classifier.weight"] == (classes, hidden)
    x = states(5, in_features)
    inner = gelu(norm(linear(x, weights, "expand"), weights, "norm", 1e-5))
    close(head(x), linear(inner, weights, "classifier"))
    rounded = head.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.to(torch.bfloat16).float())


def test_hidden_width_of_vqa_and_snli_ve_is_a_setting_and_that_of_nlvr2_is_not():
    for name, hidden in (("vqa", 2 * D), ("snli_ve", 2 * D), ("nlvr2", 3 * D)):
        assert head_of(name, classifier_scale=1.0)[1]["norm.weight"].shape == (hidden,)


def test_only_the_nlvr2_head_has_dropout_and_only_in_training():
    for name, in_features in (("vqa", 2 * D), ("snli_ve", 2 * D), ("nlvr2", 4 * D)):
        head, _ = head_of(name)
        x = states(5, in_features)
        assert torch.equal(head(x), head(x))
        head.train()
        assert torch.equal(head(x), head(x)) == (name != "nlvr2")
    zeros = torch.nn.functional.dropout(torch.ones(100_000), head.dropout).eq(0).float().mean()
    assert abs(float(zeros) - 0.1) < 0.01


# Sizes.


def sizes(width: int, answers: int = 3129, words: int = 50_265) -> dict[str, int]:
    pooled, hidden = 2 * width, 4 * width
    return {
        "mlm": width * width + width + 2 * width + words * width + words,
        "itm": pooled * 2 + 2,
        "itc": 2 * (width * 256 + 256) + 1,
        "vqa": pooled * hidden + hidden + 2 * hidden + hidden * answers + answers,
        "snli_ve": pooled * hidden + hidden + 2 * hidden + hidden * 3 + 3,
        "nlvr2": 2 * pooled * 2304 + 2304 + 2 * 2304 + 2304 * 2 + 2,
        "rank": pooled + 1,
    }


@pytest.mark.parametrize("name", HEADS)
def test_head_of_base_has_the_parameters_of_its_formula(name):
    config = complete_model_config(base())
    with torch.device("meta"):
        assert sum(value.numel() for value in build_head(name, config).parameters()) == sizes(768)[name]


def test_tied_mlm_head_of_base_has_no_decoder_matrix():
    config = complete_model_config(replace(base(), heads=HeadsConfig(mlm_tied=True)))
    with torch.device("meta"):
        num_parameters = sum(value.numel() for value in build_head("mlm", config).parameters())
    assert num_parameters == 39_245_913 - 50_265 * 768


# Initial values.


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_published_initial_weights(name):
    torch.manual_seed(0)
    config = small_config()
    wide = replace(config, fusion=replace(config.fusion, width=256, num_heads=4))
    for key, parameter in build_head(name, wide).named_parameters():
        value = parameter.detach()
        if key == "temperature":
            assert value.tolist() == [pytest.approx(0.07)]
        elif key == "norm.weight":
            assert (value == 1).all()
        elif value.ndim == 1:
            assert (value == 0).all()
        else:
            error = 0.02 / math.sqrt(value.numel())
            assert abs(value.mean()) < 5 * error and abs(value.std() - 0.02) < 5 * error


def test_two_matrices_of_a_head_have_different_initial_weights():
    head: Any = build_head("itc", replace(small_config(), text=replace(small_config().text, width=48, num_heads=3)))
    assert head.text.weight.shape == head.image.weight.shape and head.text.weight.ne(head.image.weight).any()


# In the model.


def test_tied_mlm_head_reads_and_trains_the_text_towers_word_embeddings():
    model = BridgeTower(equal_widths(mlm_tied=True), ("mlm",))
    shake(model)
    model = model.double().eval()
    words = model.text_tower.encoder.embeddings.word_embeddings.weight
    x = states(5, D)
    weights = dict(model.heads["mlm"].named_parameters())
    inner = norm(gelu(linear(x, weights, "transform")), weights, "norm", 1e-12)
    logits = model.word_logits(x)
    close(logits, inner @ words.T + weights["bias"])
    logits.logsumexp(-1).sum().backward()
    assert words.grad is not None and (words.grad.abs().amax(dim=-1) > 0).all()  # also of words that no text contains
    # The state_dict holds the matrix once.
    assert [key for key, value in model.state_dict().items() if value.shape == (WORDS, D)] == [
        "text_tower.encoder.embeddings.word_embeddings.weight"
    ]


def test_untied_mlm_head_does_not_train_the_text_towers_word_embeddings():
    model = BridgeTower(equal_widths(), ("mlm",))
    model.word_logits(states(5, D).float()).sum().backward()
    assert model.text_tower.encoder.embeddings.word_embeddings.weight.grad is None


def test_tied_mlm_head_needs_equal_widths_and_the_repair_that_the_error_names_is_accepted():
    config = config_with()
    for text in (config.text, TextTowerConfig(name="roberta-base")):
        with pytest.raises(ConfigError, match=r"width=40 with word embeddings .*Make them equal, or set it to false"):
            complete_model_config(replace(config, text=text, heads=HeadsConfig(mlm_tied=True)))
        assert complete_model_config(replace(config, text=text, heads=HeadsConfig(mlm_tied=False)))
    assert equal_widths(mlm_tied=True)


def test_nlvr2_head_adds_a_third_modality_row_that_starts_as_the_one_of_images():
    model = BridgeTower(small_config())
    shake(model)
    rows = model.modality_embedding.weight.detach().clone()
    assert rows.shape == (2, D) and rows[0].ne(rows[1]).any()
    model.add_head("nlvr2")
    grown = model.modality_embedding.weight
    assert torch.equal(grown, torch.stack([rows[0], rows[1], rows[1]])) and grown.requires_grad
    assert BridgeTower(small_config(), ("nlvr2",)).modality_embedding.weight.shape == (3, D)


@torch.no_grad()
def test_second_image_is_marked_with_the_third_row():
    model = BridgeTower(small_config(), ("nlvr2",))
    shake(model)
    model = model.double().eval()
    rows, pixels = model.modality_embedding.weight, random_pixels(2)
    first, second = model.encode_image(pixels).states_KBND, model.encode_image(pixels, image_row=2).states_KBND
    close(second - first, (rows[2] - rows[1]).expand_as(first))
    for row in (3, -1):
        with pytest.raises(ConfigError, match=f"image_row={row}, but the modality embedding has 3 rows"):
            model.encode_image(pixels, image_row=row)


@torch.no_grad()
def test_second_image_without_an_nlvr2_head_is_refused_and_the_repair_that_the_error_names_is_accepted():
    model, pixels = BridgeTower(small_config()), random_pixels(2).float()
    with pytest.raises(ConfigError, match=r"image_row=2, but .* has 2 rows.*model\.add_head\('nlvr2'\)"):
        model.encode_image(pixels, image_row=2)
    model.add_head("nlvr2")
    assert model.encode_image(pixels, image_row=2).states_KBND.shape == (3, 2, 10, D)


def test_rank_head_starts_as_the_match_row_of_the_itm_head_and_does_not_share_it():
    model = BridgeTower(small_config(), ("itm",))
    shake(model)
    model.add_head("rank")
    heads: Any = model.heads
    match, rank = heads["itm"].classifier, heads["rank"].classifier
    assert torch.equal(rank.weight[0], match.weight[1]) and torch.equal(rank.bias[0], match.bias[1])
    assert rank.weight[0].ne(match.weight[0]).any()
    with torch.no_grad():
        rank.weight.zero_()
    assert match.weight[1].ne(0).all()


def test_an_added_head_gets_the_precision_and_mode_of_the_model():
    # The NLVR2 head has dropout, so its mode matters.
    model = BridgeTower(small_config()).double().eval()
    model.add_head("nlvr2")
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.train().add_head("vqa")
    assert model.heads["vqa"].training


def test_adding_a_head_leaves_all_other_weights_as_they_were():
    model = BridgeTower(small_config(), ("itm",))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in HEADS:
        if name != "itm":
            model.add_head(name)
    after = model.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(after[key][: len(value)], value)]
    assert changed == [] and set(model.heads) == set(HEADS)


@pytest.mark.parametrize(("name", "use"), [("mlm", "mlm_logits"), ("itm", "itm_logits")])
@torch.no_grad()
def test_use_of_a_head_that_is_missing_is_refused_and_the_repair_that_the_error_names_is_accepted(name, use):
    model = BridgeTower(small_config(), ("itc",)).eval()
    output = model(random_pixels(2).float(), *random_texts(2, 7))
    with pytest.raises(ConfigError, match=rf"no {name} head; it has itc\..*model\.add_head\('{name}'\)"):
        getattr(model, use)(output)
    model.add_head(name)
    assert getattr(model, use)(output).shape == ((2, 7, WORDS) if name == "mlm" else (2, 2))


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no head 'vqaa'\. Use one of mlm, itm, itc, vqa, snli_ve, nlvr2, rank"):
        BridgeTower(small_config(), ("vqaa",))
