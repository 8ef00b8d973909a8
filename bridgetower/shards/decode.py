"""Decoding of any image file into upright, opaque, 8-bit RGB, with Pillow. Never imports torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from bridgetower.errors import DataError

# Larger images are refused before they are decoded: a small file can claim to hold many gigabytes of pixels.
MAX_IMAGE_PIXELS = 89_478_485

_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageTooLarge(DataError):
    """An image claims more than MAX_IMAGE_PIXELS."""


@contextmanager
def open_image(raw: bytes, where: str) -> Iterator[Image.Image]:
    """Open an image, of which only the header is read, and check its size.

    Errors that decoding raises inside the ``with`` block become DataErrors, too.

    Args:
        raw: content of a file in any format that Pillow reads.
        where: name of the image in errors.

    Raises:
        ImageTooLarge: the header claims more than MAX_IMAGE_PIXELS.
        DataError: the image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"The image of {where} has more than {MAX_IMAGE_PIXELS:,} pixels ({error}). It was not decoded, as a small "
            "file can claim to be huge. Scale it down first."
        ) from error
    except Exception as error:  # damaged files make Pillow raise nearly anything: TypeError, struct.error, zlib.error
        # Pillow's own text has a memory address in it, which differs each time.
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"The image of {where} cannot be decoded ({reason}). If it is in a shard, copy or build the shard again: "
            "a build stores only images that it could decode."
        ) from error


def decode_image(raw: bytes, where: str) -> Image.Image:
    """Decode an image file into upright, opaque, 8-bit RGB.

    Args:
        raw: content of a file in any format that Pillow reads.
        where: name of the image in errors.

    Raises:
        DataError: the image cannot be decoded, or has more than MAX_IMAGE_PIXELS.
    """
    with open_image(raw, where) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to upright, opaque, 8-bit RGB."""
    image.load()
    orientation = read_orientation(image)
    return turn_upright(to_opaque_rgb(image), orientation)


def to_opaque_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB on a white background, without turning it upright.

    White, because drawings are made for a light page. The reference's RGBA -> RGB conversion shows whatever colour lies
    under transparent pixels, in many files black.
    """
    image = _to_8_bits(image)
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of a 16-bit image, and its transparent colour.

    Pillow would clip every value above 255 to white, and would not recognise the transparent colour.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        gray = image.convert("I").point(lambda value: value / 256).convert("L")
        if transparent is not None:
            gray.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
        return gray
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow has reduced the pixels to 8 bits, but not the transparent colour of a PNG.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image upright.

    Args:
        orientation: EXIF's number, as ``read_orientation`` returns it.
    """
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def read_orientation(image: Image.Image) -> int:
    """Return EXIF's number for how the camera was held: 1 to 8, where 1 is upright. Damaged EXIF data give 1."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow's EXIF reader raises nearly anything, and bad metadata is no reason to lose the image
        return 1
