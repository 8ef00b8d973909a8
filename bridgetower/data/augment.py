"""Augmentation of training images for fine-tuning; each image's depends only on a key. Never imports torch.

Both published recipes crop an image, which is then resized to the model's square, and apply two operations to the
result:

- flip_14_ops is RandAugment (N=2, M=7), after a mirror image with probability 0.5.
- no_flip_10_ops has milder operations. Brightness and sharpness change nothing at the published level, but are still
  drawn, as the published models were trained that way.

Source: microsoft/BridgeTower, src/transforms (keys blip_randaug_wc and blip_randaug_wohf); RandAugment, arXiv
1909.13719; ALBEF, dataset/randaugment.py, for no_flip_10_ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from bridgetower import rng

U8 = npt.NDArray[np.uint8]
Operation = Callable[[Image.Image, bool], Image.Image]
"""Function of an image and a direction: True reverses a shear, a shift or a rotation."""

_CROP_AREA, _CROP_ASPECT, _CROP_TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10
_STRENGTH, _MAX_STRENGTH = 7, 30  # RandAugment's M and its maximum


class Crop(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Augmentation:
    """The random augmentation of one image. Call ``crop`` once, then ``change`` once."""

    def __init__(self, recipe: str, key: int) -> None:
        """Choose the recipe.

        Args:
            recipe: flip_14_ops or no_flip_10_ops.
            key: key of the image's random numbers.
        """
        # The counter makes each draw another random number of the key.
        self._recipe, self._key, self._counter = recipe, key, 0

    def crop(self, height: int, width: int) -> Crop:
        """Draw a rectangle of at least half of the area, with an aspect ratio from 3:4 to 4:3.

        Source: torchvision's RandomResizedCrop.
        """
        for _ in range(_CROP_TRIES):
            area = height * width * self._between(*_CROP_AREA)
            aspect = math.exp(self._between(*map(math.log, _CROP_ASPECT)))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top, left = self._below(height - crop_height + 1), self._below(width - crop_width + 1)
                return Crop(top, left, crop_height, crop_width)
        # No such rectangle fits into a very long image. Take the middle.
        crop_width = min(width, round(height * _CROP_ASPECT[1]))
        crop_height = min(height, round(width / _CROP_ASPECT[0]))
        return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)

    def change(self, pixels_HWC: U8) -> U8:
        """Apply the recipe's operations to a cropped and resized image. The size does not change.

        Args:
            pixels_HWC: RGB, shape (height, width, 3).
        """
        image = Image.fromarray(pixels_HWC)
        if self._recipe == "flip_14_ops":
            if self._between(0, 1) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for operation in [_OPS_14[self._below(len(_OPS_14))] for _ in range(2)]:
                image = operation(image, self._between(0, 1) < 0.5)
        else:
            for operation in [_OPS_10[self._below(len(_OPS_10))] for _ in range(2)]:
                is_applied, is_reversed = self._between(0, 1) < 0.5, self._between(0, 1) < 0.5
                image = operation(image, is_reversed) if is_applied else image
        return np.asarray(image)

    def _between(self, low: float, high: float) -> float:
        self._counter += 1
        return low + (high - low) * float(rng.uniform(self._key, self._counter))

    def _below(self, bound: int) -> int:
        self._counter += 1
        return int(rng.below(self._key, self._counter, bound))


def _at_strength(low: float, high: float) -> float:
    """Return the parameter of an operation whose range is from ``low`` to ``high``, at the published strength."""
    return low + (high - low) * _STRENGTH / _MAX_STRENGTH


def _affine(*matrix: float, gray: bool = False) -> Operation:
    """Return a shear or shift by an affine matrix. Reversed, its difference from the identity has the other sign."""

    def change(image: Image.Image, is_reversed: bool) -> Image.Image:
        identity = (1, 0, 0, 0, 1, 0)
        data = [2 * unit - value if is_reversed else value for value, unit in zip(matrix, identity, strict=True)]
        if gray:
            return image.transform(
                image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
            )
        return image.transform(image.size, Image.Transform.AFFINE, data)

    return change


def _rotate(degrees: float, *, gray: bool = False) -> Operation:
    def change(image: Image.Image, is_reversed: bool) -> Image.Image:
        angle = -degrees if is_reversed else degrees
        if gray:
            return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        return image.rotate(angle)

    return change


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    factor = _at_strength(0.1, 1.9)
    return lambda image, _: enhancer(image).enhance(factor)


def _posterize(image: Image.Image, _: bool) -> Image.Image:
    return ImageOps.posterize(image, max(1, int(_at_strength(0, 4))))


def _solarize(image: Image.Image, _: bool) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(_at_strength(0, 256)))


def _solarize_add(image: Image.Image, _: bool) -> Image.Image:
    """Brighten all pixels, then invert those at 128 or above."""
    brighter = np.asarray(image).astype(np.int64) + int(_at_strength(0, 110))
    return ImageOps.solarize(Image.fromarray(brighter.clip(0, 255).astype(np.uint8)), 128)


def _auto_contrast(image: Image.Image, _: bool) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _: bool) -> Image.Image:
    return ImageOps.equalize(image)


def _unchanged(image: Image.Image, _: bool) -> Image.Image:
    return image


_SHEAR, _SHIFT = _at_strength(0, 0.3), _at_strength(0, 100)
_OPS_14: tuple[Operation, ...] = (
    _auto_contrast,
    _equalize,
    _rotate(_at_strength(0, 30)),
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(1, _SHEAR, 0, 0, 1, 0),
    _affine(1, 0, 0, _SHEAR, 1, 0),
    _affine(1, 0, _SHIFT, 0, 1, 0),
    _affine(1, 0, 0, 0, 1, _SHIFT),
)
# At level 5 of 10, brightness and sharpness are enhanced by the factor 1: not at all.
_OPS_10: tuple[Operation, ...] = (
    _unchanged,
    _auto_contrast,
    _unchanged,  # brightness
    _unchanged,  # sharpness
    _equalize,
    _affine(1, 0.15, 0, 0, 1, 0, gray=True),
    _affine(1, 0, 0, 0.15, 1, 0, gray=True),
    _affine(1, 0, 5, 0, 1, 0, gray=True),
    _affine(1, 0, 0, 0, 1, 5, gray=True),
    _rotate(15, gray=True),
)
