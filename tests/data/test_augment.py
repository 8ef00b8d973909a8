"""Augmentation of training images: each operation has its published effect, and a key decides all random choices."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bridgetower.data.augment import _OPS_10, _OPS_14, Augmentation

RECIPES = ("flip_14_ops", "no_flip_10_ops")


def noise(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def changed(number: int, *, is_reversed: bool = False) -> np.ndarray:
    return np.asarray(_OPS_14[number](Image.fromarray(noise()), is_reversed))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_key_decides_everything(recipe):
    def once(key):
        augmentation = Augmentation(recipe, key)
        return augmentation.crop(60, 80), augmentation.change(noise()).tobytes()

    results = [once(key) for key in range(20)]
    assert results == [once(key) for key in range(20)]
    assert len({crop for crop, _ in results}) > 15 and len({pixels for _, pixels in results}) > 5


@pytest.mark.parametrize(("height", "width"), [(480, 640), (300, 300), (1, 1), (3, 1000), (1000, 3)])
def test_a_crop_lies_in_the_image_and_is_at_least_half_of_it_if_the_shape_allows(height, width):
    for key in range(100):
        crop = Augmentation("flip_14_ops", key).crop(height, width)
        assert crop.top >= 0 and crop.left >= 0 and min(crop.height, crop.width) >= 1
        assert crop.top + crop.height <= height and crop.left + crop.width <= width
        if min(height, width) >= 300:
            assert crop.height * crop.width >= 0.49 * height * width
            assert 0.74 < crop.width / crop.height < 1.34


def test_flip_14_ops_mirrors_half_of_the_images_and_no_flip_10_ops_none():
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, 0] = 200  # only mirroring moves it to the last column
    ends = [Augmentation("flip_14_ops", key).change(stripes)[4, -1].max() > 100 for key in range(400)]
    # Some operations move or darken the stripe, so fewer than half are recognised.
    assert 60 < sum(ends) < 240
    assert not any(Augmentation("no_flip_10_ops", key).change(stripes)[4, -1].min() > 190 for key in range(100))


def test_operations_have_the_published_strength():
    pixels = noise()
    assert set(np.unique(changed(3))) == {0, 128}  # posterise to one bit
    assert np.array_equal(changed(4), np.where(pixels >= 256 * 7 / 30, 255 - pixels, pixels))
    brighter = (pixels.astype(int) + 25).clip(0, 255)
    assert np.array_equal(changed(5), np.where(brighter >= 128, 255 - brighter, brighter))
    darker = pixels.astype(float) * (0.1 + 1.8 * 7 / 30)
    assert np.abs(changed(8).astype(float) - darker).max() <= 1
    shifted = changed(12)  # by 23.3 pixels, filled with black
    assert np.array_equal(shifted[:, :8], pixels[:, 23:31]) and not shifted[:, 9:].any()
    back = changed(12, is_reversed=True)
    assert np.array_equal(back[:, 23:], pixels[:, :9]) and not back[:, :23].any()
    turned = np.asarray(Image.fromarray(pixels).rotate(7))
    assert np.array_equal(changed(2), turned) and not np.array_equal(changed(2, is_reversed=True), turned)


def test_the_milder_operations_fill_with_gray_and_leave_brightness_unchanged():
    pixels = noise()
    results = [np.asarray(op(Image.fromarray(pixels), False)) for op in _OPS_10]
    assert sum(np.array_equal(result, pixels) for result in results[:1] + results[2:4]) == 3
    assert np.array_equal(results[7][:, :26], pixels[:, 5:31]) and (results[7][:, 28:] == 128).all()
    assert (results[9][0, 0] == 128).all()
