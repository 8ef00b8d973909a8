"""Any picture file as upright, opaque, 8-bit RGB, with Pillow. Never imports torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from bridgetower.errors import DataError

# A picture of more pixels is refused before it is decoded: a small file can claim to be one of many gigabytes.
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


class PictureTooLarge(DataError):
    """A picture claims more than MAX_IMAGE_PIXELS."""


@contextmanager
def opened(raw: bytes, where: str) -> Iterator[Image.Image]:
    """A picture whose header is read and whose size is accepted; what its decoding raises becomes a DataError.

    Args:
        raw: the file's content, in any format that Pillow reads.
        where: names the picture in errors.

    Raises:
        PictureTooLarge: it claims more than MAX_IMAGE_PIXELS.
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(
            f"The image of {where} has more than {MAX_IMAGE_PIXELS:,} pixels ({error}): refused, as small files can "
            "claim to be huge. Scale it down first."
        ) from error
    except Exception as error:  # damaged files make Pillow raise nearly anything: TypeError, struct.error, zlib.error
        # Pillow's own text names an address in memory, another one each time.
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"The image of {where} cannot be decoded ({reason}). If it lies in a shard, copy or build that again: only "
            "images that could be decoded are put there."
        ) from error


def open_picture(raw: bytes, where: str) -> Image.Image:
    """Decode a picture and bring it to RGB.

    Args:
        raw: the file's content, in any format that Pillow reads.
        where: names the picture in errors.

    Raises:
        DataError: it cannot be decoded, or is larger than MAX_IMAGE_PIXELS.
    """
    with opened(raw, where) as image:
        return flatten(image)


def flatten(image: Image.Image) -> Image.Image:
    """Turn a Pillow image upright, over white where it is transparent, and to 8-bit RGB."""
    image.load()
    orientation = orientation_of(image)
    return upright(opaque_rgb(image), orientation)


def opaque_rgb(image: Image.Image) -> Image.Image:
    """A copy over white where it is transparent, in 8-bit RGB, but not turned.

    White, not the black that lies under transparent pixels in many files (which is what the reference's RGBA -> RGB
    conversion shows): drawings are made for a light page.
    """
    image = _of_8_bits(image)
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of 16, where Pillow would clip everything above 255 to white or miss the transparent colour."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        gray = image.convert("I").point(lambda value: value / 256).convert("L")
        if transparent is not None:
            gray.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
        return gray
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow has reduced the pixels, but not the colour of a PNG that counts as transparent.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as EXIF's number says."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def orientation_of(image: Image.Image) -> int:
    """EXIF's number for how the camera was held; 1 is upright, which is also what damaged EXIF data say."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a picture is not lost for its notes; Pillow's reader of them raises nearly anything
        return 1
