"""Wrong input raises an error that names the value and a repair, and the repair is accepted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bridgetower.config.model import ModelConfig
from bridgetower.errors import BridgeTowerError, ConfigError, DataError
from bridgetower.model.bridgetower import BridgeTower
from tests.model.formulas import close
from tests.small_models import PAD_ID, random_texts, shake, small_config

LONGEST, WORDS, SIDE = 18, 50, 24  # of small_config: a RoBERTa's tokens read 18 of its 20 rows of positions


@pytest.fixture(scope="module")
def model():
    model = BridgeTower(small_config())
    shake(model)
    return model.eval()


IDS, MASK = random_texts(3, 9)
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def assert_refused(error: type[BridgeTowerError], message: str, call) -> str:
    """Call, and return the message of the error that must be raised."""
    with pytest.raises(error, match=message) as caught, torch.no_grad():
        call()
    return str(caught.value)


@torch.no_grad()
def assert_accepted(model, pixels=PIXELS, ids=IDS, mask=MASK) -> None:
    assert model(pixels, ids, mask).pooled.isfinite().all()


# Settings.


@pytest.mark.parametrize("side", [30, 25, 4, 1, 0, -8])
def test_image_size_that_the_patch_does_not_divide_is_refused_with_sizes_that_fit(side):
    message = assert_refused(
        ConfigError,
        rf"image_size_px={side} is not a multiple of model.vision.patch_size_px=8",
        lambda: replace(small_config(), image_size_px=side),
    )
    repairs = [int(number) for number in re.findall(r"Use (\d+) or (\d+)", message)[0]]
    for repair in repairs:
        model = BridgeTower(replace(small_config(), image_size_px=repair)).eval()
        assert_accepted(model, torch.zeros(3, 3, repair, repair))


def with_layers(layers: int, external: int = 0) -> ModelConfig:
    config = small_config()
    return replace(config, fusion=replace(config.fusion, num_layers=layers, num_external_layers=external))


@pytest.mark.parametrize(("layers", "external"), [(5, 0), (9, 2), (12, 0)])
def test_more_bridged_layers_than_a_tower_has_are_refused_with_a_number_that_fits(layers, external):
    message = assert_refused(
        ConfigError,
        rf"num_layers={layers} with {external} external bridges {layers - external} layers, .*vision tower has \(4\)",
        lambda: with_layers(layers, external),
    )
    repair = int(re.findall(r"--model.fusion.num_layers=(\d+) or fewer", message)[0])
    assert repair == 4 + external
    assert_accepted(BridgeTower(with_layers(repair, external)).eval())
    assert_accepted(BridgeTower(with_layers(layers, layers - 4)).eval())  # enough external layers


# Images.


@pytest.mark.parametrize("side", [16, 32, 48])
def test_images_of_another_size_are_refused_with_a_size_that_the_model_can_be_loaded_with(model, side):
    pixels = torch.randn(3, 3, side, side)
    message = assert_refused(
        DataError,
        rf"shape \(3, 3, {side}, {side}\), the model reads \(pairs, 3, 24, 24\)",
        lambda: model(pixels, IDS, MASK),
    )
    repair = int(re.findall(r"image_size_px=(\d+)", message)[0])
    assert repair == side
    assert_accepted(BridgeTower(replace(small_config(), image_size_px=repair)).eval(), pixels)


@pytest.mark.parametrize("shape", [(3, 3, 25, 25), (3, 3, 24, 32), (3, 3, 32, 24), (3, 3, 7, 7), (3, 3, 0, 0)])
def test_images_whose_size_the_patch_does_not_divide_have_to_be_resized(model, shape):
    message = assert_refused(DataError, re.escape(f"shape {shape}"), lambda: model(torch.zeros(shape), IDS, MASK))
    assert message.endswith("Resize the images to 24 x 24 pixels.")


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 1, 24, 24), (3, 24, 24, 3), (3, 3, 3, 24, 24), (0, 3, 24, 24), ()])
def test_tensors_that_are_not_a_batch_of_rgb_images_are_refused(model, shape):
    message = assert_refused(DataError, re.escape(f"shape {shape}"), lambda: model(torch.zeros(shape), IDS, MASK))
    assert message.endswith("Give one or more RGB images, channels before height and width.")


def test_integer_pixels_are_refused_and_can_be_normalised(model):
    pixels = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    for wrong in (pixels, pixels.long()):
        assert_refused(
            DataError, rf"pixel_values are {wrong.dtype}, .*model\.normalize", lambda x=wrong: model(x, IDS, MASK)
        )
    assert_accepted(model, model.normalize(pixels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pixels_of_another_precision_are_refused_with_the_right_cast(model, dtype):
    message = (
        rf"pixel_values are {dtype}, the weights are torch.float32. Use pixel_values.to\(torch.float32\), or torch.auto"
    )
    assert_refused(DataError, message, lambda: model(PIXELS.to(dtype), IDS, MASK))
    assert_accepted(model, PIXELS.to(dtype).to(torch.float32))
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert_accepted(model, PIXELS.to(dtype))


# Texts.


def test_text_longer_than_the_position_table_is_refused_with_the_length_that_fits(model):
    ids = torch.randint(5, WORDS, (3, LONGEST + 1), generator=torch.Generator().manual_seed(0))
    message = assert_refused(DataError, "input_ids have 19 tokens", lambda: model(PIXELS, ids, torch.ones_like(ids)))
    longest = int(re.findall(r"positions for (\d+)", message)[0])
    assert_accepted(model, ids=ids[:, :longest], mask=torch.ones_like(ids)[:, :longest])
    assert_refused(DataError, "input_ids have 19 tokens", lambda: model.encode_text(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("wrong", [WORDS, 50_264, -1, -100])
def test_ids_outside_the_vocabulary_are_refused_with_the_valid_range(model, wrong):
    ids = IDS.clone()
    ids[1, 1] = wrong
    for call in (lambda: model(PIXELS, ids, MASK), lambda: model.encode_text(ids, MASK)):
        assert_refused(
            DataError, rf"input_ids hold {wrong}, the vocabulary has ids from 0 to 49\. Use the tokenizer", call
        )
    ids[1, 1] = 49
    assert_accepted(model, ids=ids)


@pytest.mark.parametrize("change", [torch.Tensor.float, torch.Tensor.bool, torch.Tensor.byte, lambda ids: ids[0]])
def test_ids_of_another_type_or_shape_are_refused(model, change):
    ids = change(IDS)
    message = re.escape(f"input_ids have shape {tuple(ids.shape)} and type {ids.dtype}")
    for call in (lambda: model(PIXELS, ids, MASK), lambda: model.encode_text(ids, MASK)):
        assert "Give the tokenizer's ids, one row per text" in assert_refused(DataError, message, call)
    assert_accepted(model, ids=IDS.int())


@pytest.mark.parametrize("shape", [(3, 0), (0, 9)])
def test_texts_without_a_token_are_refused(model, shape):
    ids = torch.ones(shape, dtype=torch.long)
    assert_refused(DataError, re.escape(f"shape {shape}"), lambda: model(PIXELS[: shape[0] or 3], ids, ids.bool()))


@pytest.mark.parametrize("change", [lambda m: m[:, :8], lambda m: m[:2], lambda m: m[:, None, None, :], lambda m: m[0]])
def test_mask_of_another_shape_is_refused_with_both_shapes(model, change):
    mask = change(MASK)
    message = re.escape(f"attention_mask has shape {tuple(mask.shape)}, the tokens (3, 9). Give one value per token")
    encoded = model.encode_text(IDS, MASK).states_KBND
    image = model.encode_image(PIXELS).states_KBND
    for call in (
        lambda: model(PIXELS, IDS, mask),
        lambda: model.encode_text(IDS, mask),
        lambda: model.fuse(encoded, image, mask),
    ):
        assert_refused(DataError, message, call)


@torch.no_grad()
def test_an_integer_mask_is_accepted_by_every_public_method(model):
    # Passed on as it is, attention would add it to its scores.
    image = model.encode_image(PIXELS).states_KBND
    text = model.encode_text(IDS, MASK)
    for mask in (MASK.long(), MASK.byte(), MASK.int()):
        close(model.encode_text(IDS, mask).states_KBND, text.states_KBND, 0)
        close(model.fuse(text.states_KBND, image, mask).pooled, model.fuse(text.states_KBND, image, MASK).pooled, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_floating_point_mask_is_refused_since_additive_masks_mean_the_opposite(model, dtype):
    added = (1 - MASK.to(dtype)) * -10_000
    text, image = model.encode_text(IDS, MASK).states_KBND, model.encode_image(PIXELS).states_KBND
    for call in (
        lambda: model(PIXELS, IDS, added),
        lambda: model.encode_text(IDS, added),
        lambda: model.fuse(text, image, added),
    ):
        assert_refused(DataError, rf"attention_mask is {dtype}\. .*mask\.bool\(\) or mask == 0", call)
    assert_accepted(model, mask=added == 0)


@torch.no_grad()
def test_states_of_padding_do_not_matter(model):
    assert (IDS[~MASK] == PAD_ID).all() and (~MASK).any()
    text = model.encode_text(IDS, MASK).states_KBND
    image = model.encode_image(PIXELS).states_KBND
    changed = torch.where(MASK[None, :, :, None], text, text + 100)
    before, after = model.fuse(text, image, MASK), model.fuse(changed, image, MASK)
    close(after.pooled, before.pooled, 1e-5)


# Pairs.


def test_different_numbers_of_images_and_texts_are_refused_with_both_numbers(model):
    message = r"There are 2 images and 3 texts; .* Repeat\s+the images, or encode both apart"
    assert_refused(DataError, message, lambda: model(PIXELS[:2], IDS, MASK))
    assert_accepted(model, PIXELS[[0, 0, 1]])
    text, image = model.encode_text(IDS, MASK).states_KBND, model.encode_image(PIXELS[:2]).states_KBND
    message = r"states of 2 images and 3 texts; .* states_KBND\[:, rows\]"
    assert_refused(DataError, message, lambda: model.fuse(text, image, MASK))
    assert model.fuse(text, image[:, [0, 0, 1]], MASK).pooled.shape == (3, 80)


def test_states_of_other_layers_or_another_width_are_refused(model):
    text, image = model.encode_text(IDS, MASK).states_KBND, model.encode_image(PIXELS).states_KBND
    for wrong in (text[:2], torch.cat([text, text]), text[0], text[..., :32]):
        message = re.escape(
            f"text states have shape {tuple(wrong.shape)}, the cross-modal encoder reads (3, pairs, posit"
        )
        assert_refused(DataError, message, lambda x=wrong: model.fuse(x, image, MASK))
        assert_refused(DataError, "The image states have shape", lambda x=wrong: model.fuse(text, x, MASK))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_states_of_another_precision_are_refused_with_the_right_cast(model, dtype):
    # Cached features may be stored in half precision.
    with torch.no_grad():
        text, image = model.encode_text(IDS, MASK).states_KBND, model.encode_image(PIXELS).states_KBND
    message = (
        rf"states are {dtype}, the weights are torch.float32. Use states_KBND.to\(torch.float32\), or torch.autocast"
    )
    assert_refused(DataError, f"The text {message}", lambda: model.fuse(text.to(dtype), image, MASK))
    assert_refused(DataError, f"The image {message}", lambda: model.fuse(text, image.to(dtype), MASK))
    assert model.fuse(text.to(dtype).float(), image.to(dtype).float(), MASK).pooled.isfinite().all()
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert model.fuse(text.to(dtype), image.to(dtype), MASK).pooled.isfinite().all()
