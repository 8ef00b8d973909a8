"""Changes of training pictures: what each does, and that a key decides all of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bridgetower.data.augment import _OPS_10, _OPS_14, Augmentation

KINDS = ("flip_14_ops", "no_flip_10_ops")


def noise(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def changed(number: int, *, backwards: bool = False, pixels: np.ndarray | None = None) -> np.ndarray:
    given = noise() if pixels is None else pixels
    return np.asarray(_OPS_14[number](Image.fromarray(given), backwards))


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_decides_everything(kind):
    def once(key):
        augmentation = Augmentation(kind, key)
        return augmentation.crop(60, 80), augmentation.change(noise()).tobytes()

    results = [once(key) for key in range(20)]
    assert results == [once(key) for key in range(20)]
    assert len({crop for crop, _ in results}) > 15 and len({pixels for _, pixels in results}) > 5


@pytest.mark.parametrize(("height", "width"), [(480, 640), (300, 300), (1, 1), (3, 1000), (1000, 3)])
def test_a_crop_lies_in_the_picture_and_is_half_of_it_or_more_where_its_shape_allows(height, width):
    for key in range(100):
        crop = Augmentation("flip_14_ops", key).crop(height, width)
        assert crop.top >= 0 and crop.left >= 0 and min(crop.height, crop.width) >= 1
        assert crop.top + crop.height <= height and crop.left + crop.width <= width
        if min(height, width) >= 300:
            assert crop.height * crop.width >= 0.49 * height * width
            assert 0.74 < crop.width / crop.height < 1.34


def test_half_of_the_pictures_are_mirrored_but_not_those_with_questions():
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, 0] = 200  # only a mirror image moves it to the last column
    ends = [Augmentation("flip_14_ops", key).change(stripes)[4, -1].max() > 100 for key in range(400)]
    # Some changes move or darken it, so that fewer are seen.
    assert 60 < sum(ends) < 240
    assert not any(Augmentation("no_flip_10_ops", key).change(stripes)[4, -1].min() > 190 for key in range(100))


def test_changes_have_the_published_strength():
    pixels = noise()
    assert set(np.unique(changed(3))) == {0, 128}  # posterize: one bit
    assert np.array_equal(changed(4), np.where(pixels >= 256 * 7 / 30, 255 - pixels, pixels))
    brighter = (pixels.astype(int) + 25).clip(0, 255)
    assert np.array_equal(changed(5), np.where(brighter >= 128, 255 - brighter, brighter))
    darker = pixels.astype(float) * (0.1 + 1.8 * 7 / 30)
    assert np.abs(changed(8).astype(float) - darker).max() <= 1
    shifted = changed(12)  # by 23.3 pixels, over black
    assert np.array_equal(shifted[:, :8], pixels[:, 23:31]) and not shifted[:, 9:].any()
    back = changed(12, backwards=True)
    assert np.array_equal(back[:, 23:], pixels[:, :9]) and not back[:, :23].any()
    turned = np.asarray(Image.fromarray(pixels).rotate(7))
    assert np.array_equal(changed(2), turned) and not np.array_equal(changed(2, backwards=True), turned)


def test_the_milder_changes_fill_with_gray_and_leave_brightness_alone():
    pixels = noise()
    results = [np.asarray(op(Image.fromarray(pixels), False)) for op in _OPS_10]
    assert sum(np.array_equal(result, pixels) for result in results[:1] + results[2:4]) == 3
    assert np.array_equal(results[7][:, :26], pixels[:, 5:31]) and (results[7][:, 28:] == 128).all()
    assert (results[9][0, 0] == 128).all()
