"""Converts an image file to the bytes in the shard: checked, upright, RGB, scaled down once, with a perceptual hash."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from bridgetower.errors import DataError
from bridgetower.shards.decode import ImageTooLarge, open_image, read_orientation, to_opaque_rgb, to_rgb, turn_upright
from data_prep.record import ImagePolicy

# OpenCV would start a thread per core, but each core already has a worker process.
cv2.setNumThreads(1)

Pixels = npt.NDArray[np.uint8]
"""RGB pixels, (height, width, 3)."""

_PLAIN_FORMATS = {"JPEG": "jpg", "PNG": "png"}
_MAX_JPEG_SIDE_PX = 65_500  # limit of libjpeg
_GAUSSIAN_WIDTH = 0.35  # standard deviation in pixels of the smaller image
_MAX_GAUSSIAN_SCALE = 4.0
_LARGE_PIXELS = 12_000_000
"""Number of pixels above which an image is converted in strips; only Pillow's copy is whole (4 bytes per pixel)."""
_STRIP_PIXELS = 1_000_000
_HASH_SIDE = 8
_HASH_INPUT_PX = 32
_HASH_DENSE_PX = 128


class Rejected(Exception):
    """An image cannot be used; the text is the reason, under which the manifest counts it."""


class Converted(NamedTuple):
    """An image as it is written to the shard."""

    content: bytes
    suffix: str
    width_px: int
    height_px: int
    phash: int
    """64 bits, see perceptual_hash."""


def convert(raw: bytes, images: ImagePolicy, where: str) -> Converted:
    """Convert an image to its final form; a file that already has it is passed on unchanged.

    Every file is decoded to its end, so that damaged ones are found. A file that is passed on is decoded only as finely
    as its hash needs.

    Args:
        where: names the image in errors.

    Raises:
        Rejected: the image cannot be used.
    """
    if not raw:
        raise Rejected("image file empty")
    try:
        with open_image(raw, where) as image:
            is_plain = _is_plain(image)
            if is_plain and _scale_size(image.size, images.short_side_px) == image.size:
                size, suffix = image.size, _PLAIN_FORMATS[str(image.format)]
                # At an eighth of the size, libjpeg still reads every bit, but computes only a 64th of the pixels.
                image.draft(None, (size[0] // 8, size[1] // 8))
                return Converted(raw, suffix, *size, perceptual_hash(_read_sparse_pixels(image)))
            pixels = _decode_fast(raw, image, images) if is_plain else None
            if pixels is None:
                pixels = _read_pixels(image, images.short_side_px)
    except ImageTooLarge:
        raise Rejected("image has too many pixels") from None
    except DataError:
        raise Rejected("image cannot be decoded") from None
    pixels = scale_down(pixels, _scale_size((pixels.shape[1], pixels.shape[0]), images.short_side_px))
    content, suffix = _encode(pixels, images)
    return Converted(content, suffix, pixels.shape[1], pixels.shape[0], perceptual_hash(pixels))


def scale_down(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Scale an image down, close to Pillow's antialiased bicubic filter (45 to 53 dB) in a fifth of its time.

    A Gaussian blur removes frequencies that the smaller grid cannot hold, and cubic interpolation samples between the
    pixels, both in integer arithmetic. The width of the Gaussian was fitted to Pillow's filter on photographs, for
    scales of 1.05 to 3. cv2.INTER_AREA, which img2dataset uses, is three times slower and further off (42 to 49 dB).

    Args:
        size: new width and height.
    """
    scale = pixels.shape[0] / size[1]
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    if scale > _MAX_GAUSSIAN_SCALE:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    smooth = cv2.GaussianBlur(pixels, (0, 0), _GAUSSIAN_WIDTH * scale)
    return np.asarray(cv2.resize(smooth, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def _is_plain(image: Image.Image) -> bool:
    """Return true if the pixels are already upright, opaque and RGB or gray, in a format that every reader knows."""
    return (
        image.format in _PLAIN_FORMATS
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and read_orientation(image) == 1
    )


def _decode_fast(raw: bytes, image: Image.Image, images: ImagePolicy) -> Pixels | None:
    """Decode a JPEG at a half, a quarter or an eighth of its size where that is at least twice the final size.

    Returns: None for other formats and for files about which libjpeg gives a warning: Pillow then decides which of
        these are harmless and which are truncated.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    width, height = _scale_size(image.size, 2 * images.short_side_px)
    try:
        decoded: Pixels = simplejpeg.decode_jpeg(
            raw, "RGB", min_height=height, min_width=width, min_factor=2.0, strict=True
        )
    except ValueError:
        return None
    return decoded


def _read_pixels(image: Image.Image, short_side_px: int) -> Pixels:
    """Return the upright, opaque RGB pixels; those of a large image already reduced, to save memory.

    A large image is read in strips and averaged to a bit more than _MAX_GAUSSIAN_SCALE times its final size, at which
    scale_down would average, too.
    """
    if image.width * image.height <= _LARGE_PIXELS:
        return np.asarray(to_rgb(image))
    image.load()
    reduced_px = math.ceil(_MAX_GAUSSIAN_SCALE * min(_scale_size(image.size, short_side_px))) + 1
    factor = max(1, min(image.size) // reduced_px)
    width, height = image.width // factor, image.height // factor
    rows = max(1, _STRIP_PIXELS // (image.width * factor))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        end = min(height, top + rows)
        strip = np.asarray(to_opaque_rgb(image.crop((0, top * factor, image.width, end * factor))))
        pixels[top:end] = cv2.resize(strip, (width, end - top), interpolation=cv2.INTER_AREA) if factor > 1 else strip
    orientation = read_orientation(image)
    return pixels if orientation == 1 else np.asarray(turn_upright(Image.fromarray(pixels), orientation))


def _read_sparse_pixels(image: Image.Image) -> Pixels:
    """Return only the pixels of an image that perceptual_hash reads."""
    step = _get_hash_step(image.size)
    rows = max(1, _STRIP_PIXELS // (image.width * step)) * step
    image.load()
    strips = (image.crop((0, top, image.width, min(image.height, top + rows))) for top in range(0, image.height, rows))
    return np.concatenate([np.asarray(strip.convert("RGB"))[::step, ::step].copy() for strip in strips])


def _scale_size(size: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """Return width and height scaled down to this short side, never up; 0: unchanged."""
    if not short_side_px or min(size) <= short_side_px:
        return size
    longer = max(short_side_px, round(max(size) * short_side_px / min(size)))
    return (longer, short_side_px) if size[0] >= size[1] else (short_side_px, longer)


def _encode(pixels: Pixels, images: ImagePolicy) -> tuple[bytes, str]:
    if images.lossless:
        stream = io.BytesIO()
        # zlib's strongest level takes four times as long for 4 % fewer bytes.
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue(), "png"
    if max(pixels.shape) > _MAX_JPEG_SIDE_PX:
        raise Rejected(f"image longer than {_MAX_JPEG_SIDE_PX:,} pixels")
    # Colours at half the resolution, as in nearly all photographs on the web: a fifth fewer bytes, faster to decode.
    content = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=images.jpeg_quality, colorspace="RGB", colorsubsampling="420"
    )
    return bytes(content), "jpg"


def perceptual_hash(pixels: Pixels) -> int:
    """Compute a 64-bit hash that copies of an image share, whatever their size and compression.

    Copies mostly share all 64 bits, seldom fewer than 60. Each bit says if one of the lowest 8 x 8 frequencies of the
    discrete cosine transform of the image, at 32 x 32 gray pixels, is above their median.

    Source: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010.
    """
    step = _get_hash_step(pixels.shape[:2])
    gray = cv2.cvtColor(np.ascontiguousarray(pixels[::step, ::step]), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (_HASH_INPUT_PX, _HASH_INPUT_PX), interpolation=cv2.INTER_AREA)
    cosines = _compute_cosines()
    # All values are whole numbers below 2^53, so the sums are exact, and every machine gets the same bits.
    frequencies = (cosines @ small.astype(np.float64) @ cosines.T).ravel()
    median = np.sort(frequencies)[31:33].mean()
    is_above = frequencies > median
    return int.from_bytes(np.packbits(is_above).tobytes(), "big")


def _get_hash_step(size: tuple[int, ...]) -> int:
    """Return the distance of the pixels that are averaged: in a large image, every second or third pixel is enough."""
    return max(1, min(size) // _HASH_DENSE_PX)


@lru_cache
def _compute_cosines() -> npt.NDArray[np.float64]:
    """Return the first rows of the cosine transform times 2^14, rounded: (frequency, position)."""
    frequency = np.arange(_HASH_SIDE)[:, None]
    position = np.arange(_HASH_INPUT_PX)[None, :]
    cosines = np.cos(np.pi * frequency * (2 * position + 1) / (2 * _HASH_INPUT_PX))
    return np.asarray(np.rint(cosines * 2**14), np.float64)
