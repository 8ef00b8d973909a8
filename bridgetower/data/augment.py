"""Changes of training pictures for fine-tuning, each a function of a key. Never imports torch.

Two published recipes. Both crop, resize to the model's square and then change what is left: flip_14_ops is RandAugment
(N=2, M=7) with a mirror image half of the time; no_flip_10_ops has milder changes, of which brightness and sharpness
change nothing at the published level (they are drawn all the same, as that is what was trained with).
Sources: microsoft/BridgeTower, src/transforms (keys blip_randaug_wc and blip_randaug_wohf); RandAugment, arXiv
1909.13719; ALBEF, dataset/randaugment.py, for the second.
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
Change = Callable[[Image.Image, bool], Image.Image]
"""A picture and whether the change goes the other way."""

_CROP_AREA, _CROP_ASPECT, _CROP_TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10
_STRENGTH, _STRONGEST = 7, 30  # of RandAugment


class Crop(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Augmentation:
    """The changes of one picture."""

    def __init__(self, kind: str, key: int) -> None:
        """Take a recipe.

        Args:
            kind: flip_14_ops or no_flip_10_ops.
            key: of the picture's random numbers.
        """
        self._kind, self._key, self._drawn = kind, key, 0

    def crop(self, height: int, width: int) -> Crop:
        """Half of the area or more, of an aspect ratio from 3:4 to 4:3. Source: torchvision's RandomResizedCrop."""
        for _ in range(_CROP_TRIES):
            area = height * width * self._between(*_CROP_AREA)
            aspect = math.exp(self._between(*map(math.log, _CROP_ASPECT)))
            wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < wide <= width and 0 < high <= height:
                return Crop(self._below(height - high + 1), self._below(width - wide + 1), high, wide)
        # None fits a picture that is much longer than wide: its middle.
        wide = min(width, round(height * _CROP_ASPECT[1]))
        high = min(height, round(width / _CROP_ASPECT[0]))
        return Crop((height - high) // 2, (width - wide) // 2, high, wide)

    def change(self, pixels_HWC: U8) -> U8:
        """Change a picture that has been cropped and resized; its size stays."""
        picture = Image.fromarray(pixels_HWC)
        if self._kind == "flip_14_ops":
            if self._between(0, 1) < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for change in [_OPS_14[self._below(len(_OPS_14))] for _ in range(2)]:
                picture = change(picture, self._between(0, 1) < 0.5)
        else:
            for change in [_OPS_10[self._below(len(_OPS_10))] for _ in range(2)]:
                is_made, is_reversed = self._between(0, 1) < 0.5, self._between(0, 1) < 0.5
                picture = change(picture, is_reversed) if is_made else picture
        return np.asarray(picture)

    def _between(self, low: float, high: float) -> float:
        self._drawn += 1
        return low + (high - low) * float(rng.uniform(self._key, self._drawn))

    def _below(self, bound: int) -> int:
        self._drawn += 1
        return int(rng.below(self._key, self._drawn, bound))


def _at_strength(low: float, high: float) -> float:
    return low + (high - low) * _STRENGTH / _STRONGEST


def _affine(*matrix: float, gray: bool = False) -> Change:
    """A shear or a shift by what differs from the identity; the other way round if reversed."""

    def change(picture: Image.Image, is_reversed: bool) -> Image.Image:
        identity = (1, 0, 0, 0, 1, 0)
        data = [2 * own - one if is_reversed else one for one, own in zip(matrix, identity, strict=True)]
        if gray:
            return picture.transform(
                picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
            )
        return picture.transform(picture.size, Image.Transform.AFFINE, data)

    return change


def _rotate(degrees: float, *, gray: bool = False) -> Change:
    def change(picture: Image.Image, is_reversed: bool) -> Image.Image:
        angle = -degrees if is_reversed else degrees
        if gray:
            return picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        return picture.rotate(angle)

    return change


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    factor = _at_strength(0.1, 1.9)
    return lambda picture, _: kind(picture).enhance(factor)


def _posterize(picture: Image.Image, _: bool) -> Image.Image:
    return ImageOps.posterize(picture, max(1, int(_at_strength(0, 4))))


def _solarize(picture: Image.Image, _: bool) -> Image.Image:
    return ImageOps.solarize(picture, math.ceil(_at_strength(0, 256)))


def _solarize_add(picture: Image.Image, _: bool) -> Image.Image:
    """Brighten all pixels, then invert those of 128 and more."""
    brighter = np.asarray(picture).astype(np.int64) + int(_at_strength(0, 110))
    return ImageOps.solarize(Image.fromarray(brighter.clip(0, 255).astype(np.uint8)), 128)


def _auto_contrast(picture: Image.Image, _: bool) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, _: bool) -> Image.Image:
    return ImageOps.equalize(picture)


def _unchanged(picture: Image.Image, _: bool) -> Image.Image:
    return picture


_SHEAR, _SHIFT = _at_strength(0, 0.3), _at_strength(0, 100)
_OPS_14: tuple[Change, ...] = (
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
# At level 5 of 10 the enhancements of brightness and sharpness have the factor 1.
_OPS_10: tuple[Change, ...] = (
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
