"""The forward pass against two implementations that share no code with it: explicit formulas, and Hugging Face's."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerTextConfig,
    BridgeTowerVisionConfig,
)

from bridgetower.config.model import CUSTOM, FusionConfig, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.model.bridgetower import BridgeTower
from tests.model.formulas import close
from tests.small_models import PAD_ID, random_pixels, random_texts, shake, small_config, small_model

# The published cross-modal part (reference_spec 1.5), one pair, one head and one matmul at a time. Unlike
# tests/model/formulas.py it starts from raw tower states and masks by adding -10,000, as the published code does.


class Formulas:
    def __init__(self, model: BridgeTower) -> None:
        self.weights = dict(model.named_parameters())
        self.fusion = model.config.fusion

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("nd,ed->ne", x, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return (x - mean) / torch.sqrt(variance + eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, x: Tensor, context: Tensor, context_mask: Tensor, name: str) -> Tensor:
        query, key, value = (
            self.linear(states, f"{name}.{part}")
            for part, states in (("query", x), ("key", context), ("value", context))
        )
        size = self.fusion.width // self.fusion.num_heads
        heads = []
        for head in range(self.fusion.num_heads):
            channels = slice(head * size, (head + 1) * size)
            # The mask is added to the scores, as published.
            scores = query[:, channels] @ key[:, channels].T / math.sqrt(size) + (1 - context_mask.double()) * -10_000
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, channels])
        result = self.linear(torch.cat(heads, dim=-1), f"{name}.output")
        return self.norm(x + result, f"{name}.norm", self.fusion.layer_norm_eps)

    def layer(self, x: Tensor, x_mask: Tensor, other: Tensor, other_mask: Tensor, name: str) -> Tensor:
        a = self.attention(x, x, x_mask, f"{name}.self_attention")
        b = self.attention(a, other, other_mask, f"{name}.cross_attention")
        inner = self.linear(b, f"{name}.feed_forward.expand")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        outer = self.linear(inner, f"{name}.feed_forward.contract")
        return self.norm(b + outer, f"{name}.feed_forward.norm", self.fusion.layer_norm_eps)

    def fuse(self, texts: list[Tensor], images: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return text states, image states and pooled pair, from raw tower states of one pair, lowest layer first."""
        modality = self.weights["modality_embedding.weight"]
        texts = [self.linear(state, "text_transform") + modality[0] for state in texts]
        images = [self.linear(state, "image_transform") + modality[1] for state in images]
        everywhere = torch.ones(len(images[0]), dtype=torch.bool)
        x, y = self.norm(texts[0], "cross_modal.text_norm", 1e-5), self.norm(images[0], "cross_modal.image_norm", 1e-5)
        for index in range(self.fusion.num_layers):
            if index:
                x = self.norm(x + texts[index], f"cross_modal.text_bridges.{index - 1}.norm", 1e-5)
                y = self.norm(y + images[index], f"cross_modal.image_bridges.{index - 1}.norm", 1e-5)
            x, y = (
                self.layer(x, mask, y, everywhere, f"cross_modal.text_layers.{index}"),
                self.layer(y, everywhere, x, mask, f"cross_modal.image_layers.{index}"),
            )
        pooled = [
            torch.tanh(self.linear(states[:1], f"{name}_pooler"))[0] for name, states in (("text", x), ("image", y))
        ]
        return x, y, torch.cat(pooled)


@torch.no_grad()
def test_forward_pass_equals_the_published_formulas():
    model = small_model()
    (ids, mask), pixels = random_texts(3, 9), random_pixels(3)
    output = model(pixels, ids, mask)
    texts, images = model.text_tower(ids, mask, 3), model.vision_tower(pixels, 3)
    formulas = Formulas(model)
    for row in range(3):
        x, y, pooled = formulas.fuse([state[row] for state in texts], [state[row] for state in images], mask[row])
        length = int(mask[row].sum())
        close(output.text_states[row, :length], x[:length])
        close(output.image_states[row], y)
        close(output.pooled[row], pooled)


# Hugging Face's port, whose graph is the published one (reference_spec section 6). It ties sizes together: one width,
# 64 channels per head, as many layers in both towers, and an epsilon of 1e-5 everywhere.

WIDTH, HEADS, LAYERS, BRIDGED, VOCABULARY = 128, 2, 4, 3, 50


def their_config() -> BridgeTowerConfig:
    text = BridgeTowerTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=20,
    )
    vision = BridgeTowerVisionConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, patch_size=8, image_size=24)
    return BridgeTowerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=BRIDGED,
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
    )


def our_config() -> ModelConfig:
    return ModelConfig(
        image_size_px=24,
        vision=VisionTowerConfig(name=CUSTOM, patch_size_px=8, width=WIDTH, num_layers=LAYERS, num_heads=HEADS),
        text=TextTowerConfig(
            name=CUSTOM,
            vocabulary_size=VOCABULARY,
            max_tokens=12,
            width=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            num_positions=20,
        ),
        fusion=FusionConfig(width=WIDTH, num_layers=BRIDGED, num_heads=HEADS, layer_norm_eps=1e-5),
    )


THEIR_NAMES = [
    (r"text_model\.", "text_tower.encoder."),
    (r"vision_model\.visual\.embeddings\.patch_embedding\.", "vision_tower.vit.conv1."),
    (r"vision_model\.visual\.embeddings\.class_embedding", "vision_tower.vit.class_embedding"),
    (r"vision_model\.visual\.embeddings\.position_embedding\.weight", "vision_tower.vit.positional_embedding"),
    (r"vision_model\.visual\.", "vision_tower.vit."),
    (r"token_type_embeddings\.", "modality_embedding."),
    (r"cross_modal_(text|image)_transform\.", r"\1_transform."),
    (r"cross_modal_(text|image)_pooler\.dense\.", r"\1_pooler."),
    (r"cross_modal_(text|image)_layernorm\.", r"cross_modal.\1_norm."),
    (r"cross_modal_(text|image)_link_tower\.(\d+)\.LayerNorm\.", r"cross_modal.\1_bridges.\2.norm."),
    (r"cross_modal_(text|image)_layers\.", r"cross_modal.\1_layers."),
]
THEIR_LAYER_NAMES = [
    (r"\.attention\.", ".self_attention."),
    (r"\.crossattention\.", ".cross_attention."),
    (r"attention\.self\.", "attention."),
    (r"attention\.output\.dense\.", "attention.output."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"\.intermediate\.dense\.", ".feed_forward.expand."),
    (r"(\d)\.output\.dense\.", r"\1.feed_forward.contract."),
    (r"(\d)\.output\.LayerNorm\.", r"\1.feed_forward.norm."),
]


def our_name(theirs: str) -> str:
    pattern, replacement = next(pair for pair in THEIR_NAMES if re.match(pair[0], theirs))
    name = re.sub(pattern, replacement, theirs)
    if name.startswith("cross_modal."):
        for pattern, replacement in THEIR_LAYER_NAMES:
            name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def theirs_and_ours():
    """Return both implementations with the same random weights, in float64."""
    theirs = BridgeTowerForMaskedLM(their_config()).double().eval()
    shake(theirs)
    ours = BridgeTower(our_config(), ("mlm", "itm")).double().eval()
    weights = {our_name(name): value for name, value in theirs.bridgetower.named_parameters()}
    # Their text pooler, which nothing reads, has no counterpart; all other weights have one.
    assert weights.pop("text_tower.encoder.pooler.dense.weight").shape == (WIDTH, WIDTH)
    assert weights.pop("text_tower.encoder.pooler.dense.bias").shape == (WIDTH,)
    report = ours.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and all(name.startswith("heads.") for name in report.missing_keys)
    return theirs, ours


@pytest.fixture(scope="module")
def inputs():
    ids, mask = random_texts(3, 9)
    return {"pixel_values": random_pixels(3), "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_forward_pass_equals_hugging_faces(theirs_and_ours, inputs):
    theirs, ours = theirs_and_ours
    mask = inputs["attention_mask"]
    expected = theirs.bridgetower(**{**inputs, "attention_mask": mask.long()})
    output = ours(**inputs)
    close(output.text_states[mask], expected.text_features[mask])
    close(output.image_states, expected.image_features)
    close(output.pooled, expected.pooler_output)


@torch.no_grad()
def test_masked_word_logits_equal_hugging_faces(theirs_and_ours, inputs):
    theirs, ours = theirs_and_ours
    mask = inputs["attention_mask"]
    expected = theirs(**{**inputs, "attention_mask": mask.long()}).logits
    head = ours.mlm_head
    score = theirs.mlm_score
    head.load_state_dict(
        {
            **{f"transform.{name}": value for name, value in score.transform.dense.state_dict().items()},
            **{f"norm.{name}": value for name, value in score.transform.LayerNorm.state_dict().items()},
            "decoder.weight": score.decoder.weight,
            "bias": score.bias,
        },
        strict=True,
    )
    close(ours.mlm_logits(ours(**inputs))[mask], expected[mask])


@torch.no_grad()
def test_match_logits_equal_hugging_faces(theirs_and_ours, inputs):
    masked_lm, ours = theirs_and_ours
    theirs = BridgeTowerForImageAndTextRetrieval(their_config()).double().eval()
    theirs.bridgetower = masked_lm.bridgetower
    ours.itm_head.classifier.load_state_dict(theirs.itm_score.fc.state_dict(), strict=True)
    expected = theirs(**{**inputs, "attention_mask": inputs["attention_mask"].long()}).logits
    close(ours.itm_logits(ours(**inputs)), expected)


@torch.no_grad()
def test_layer_norm_eps_applies_to_cross_modal_layers_and_not_to_bridges():
    (ids, mask), pixels = random_texts(2, 6), random_pixels(2)
    published, ported = small_model(), small_model(small_config(layer_norm_eps=1e-5))
    assert published(pixels, ids, mask).pooled.ne(ported(pixels, ids, mask).pooled).any()
    norms = {name: module.eps for name, module in ported.named_modules() if hasattr(module, "eps")}
    assert set(norms.values()) == {1e-5}
    norms = {name: module.eps for name, module in published.named_modules() if hasattr(module, "eps")}
    is_of_layer = {name: bool(re.search(r"cross_modal\.\w+_layers|heads\.mlm", name)) for name in norms}
    assert norms == {name: 1e-12 if is_of_layer[name] else 1e-5 for name in norms}


@torch.no_grad()
def test_the_last_layers_of_each_tower_are_bridged_lowest_first():
    model = small_model()
    (ids, mask), pixels = random_texts(2, 6), random_pixels(2)
    text, image = model.encode_text(ids, mask), model.encode_image(pixels)
    every_text, every_image = model.text_tower(ids, mask, 5), model.vision_tower(pixels, 4)
    modality = model.modality_embedding.weight
    assert len(text.states_KBND) == len(image.states_KBND) == model.config.fusion.num_layers == 3
    for index in range(3):
        close(text.states_KBND[index], model.text_transform(every_text[2 + index]) + modality[0])
        close(image.states_KBND[index], model.image_transform(every_image[1 + index]) + modality[1])


@torch.no_grad()
def test_contrast_reads_the_last_class_tokens_of_the_towers():
    model = small_model()
    (ids, mask), pixels = random_texts(2, 6), random_pixels(2)
    close(model.encode_text(ids, mask).class_BD, model.text_tower(ids, mask, 1)[-1][:, 0])
    close(model.encode_image(pixels).class_BD, model.vision_tower(pixels, 1)[-1][:, 0])


@torch.no_grad()
def test_more_padding_changes_nothing():
    model = small_model()
    (ids, mask), pixels = random_texts(3, 8), random_pixels(3)
    short = model(pixels, ids, mask)
    long = model(pixels, F.pad(ids, (0, 4), value=PAD_ID), F.pad(mask, (0, 4)))
    close(long.text_states[:, :8][mask], short.text_states[mask])
    close(long.image_states, short.image_states)
    close(long.pooled, short.pooled)


@torch.no_grad()
def test_a_pair_has_the_same_output_alone_and_in_a_batch():
    model = small_model()
    (ids, mask), pixels = random_texts(3, 8), random_pixels(3)
    together = model(pixels, ids, mask)
    for row in range(3):
        only = slice(row, row + 1)
        alone = model(pixels[only], ids[only], mask[only])
        close(alone.pooled, together.pooled[only])
        close(alone.text_states[mask[only]], together.text_states[only][mask[only]])


@torch.no_grad()
def test_both_modalities_reach_each_half_of_the_pooled_pair():
    model = small_model()
    (ids, mask), pixels = random_texts(2, 8), random_pixels(2)
    before = model(pixels, ids, mask).pooled
    other_image = model(random_pixels(2, seed=1), ids, mask).pooled
    other_text = model(pixels, ids.where(ids == PAD_ID, (ids + 7) % 45 + 5), mask).pooled
    for other in (other_image, other_text):
        for half in (slice(0, 40), slice(40, 80)):
            assert (other[:, half] - before[:, half]).abs().max() > 1e-3


@torch.no_grad()
def test_an_integer_mask_is_read_as_a_boolean_one():
    model = small_model()
    (ids, mask), pixels = random_texts(2, 8), random_pixels(2)
    close(model(pixels, ids, mask.long()).pooled, model(pixels, ids, mask).pooled, tolerance=0)


def test_pixels_are_normalised_with_clips_statistics_in_the_precision_of_the_weights():
    model = BridgeTower(small_config())
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
    expected = torch.stack([(pixels[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    close(model.normalize(pixels), expected, tolerance=1e-6)
    # Mean and deviation stay in float32 when an engine casts the model, so that only the result is rounded.
    rounded = model.bfloat16().normalize(pixels)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, expected.bfloat16())


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = BridgeTower(small_config(dropout=0.5))
    (ids, mask), pixels = random_texts(2, 8), random_pixels(2).float()
    with torch.no_grad():
        assert model.train()(pixels, ids, mask).pooled.ne(model(pixels, ids, mask).pooled).any()
        assert torch.equal(model.eval()(pixels, ids, mask).pooled, model(pixels, ids, mask).pooled)


def test_new_layers_have_the_published_initial_weights():
    # Reference_spec 1.7: N(0, 0.02), biases 0, norms 1 and 0; a port has 0.05.
    torch.manual_seed(0)
    model = BridgeTower(our_config())
    new = [name for name, _ in model.named_parameters() if "_tower" not in name]
    for name in new:
        parameter = model.get_parameter(name)
        if parameter.ndim == 2:
            spread = 0.02 * (1 / (2 * parameter.numel())) ** 0.5
            assert (
                abs(parameter.std() - 0.02) < 6 * spread and abs(parameter.mean()) < 0.02 * 6 / parameter.numel() ** 0.5
            )
        else:
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all()
