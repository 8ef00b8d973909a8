"""From the bytes of an image file to the bytes in the shard: checked, upright, RGB, scaled down once, with its hash."""

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

# A worker is one process on one core.
cv2.setNumThreads(1)

Pixels = npt.NDArray[np.uint8]

_PLAIN_FORMATS = {"JPEG": "jpg", "PNG": "png"}
_MAX_JPEG_SIDE_PX = 65_500  # of libjpeg
_GAUSSIAN_WIDTH = 0.35  # in pixels of the smaller picture
_MAX_GAUSSIAN_SCALE = 4.0
# Of a picture with more pixels only Pillow's own copy is whole: 4 bytes a pixel, up to 360 MB.
_LARGE_PIXELS = 12_000_000
_STRIP_PIXELS = 1_000_000
_HASH_SIDE = 8
_HASH_INPUT_PX = 32
_HASH_DENSE_PX = 128


class Rejected(Exception):
    """An image cannot be used; the text is the reason, counted in the manifest."""


class Converted(NamedTuple):
    """An image as it goes into the shard."""

    content: bytes
    suffix: str
    width_px: int
    height_px: int
    phash: int
    """64 bits: see perceptual_hash."""


def convert(raw: bytes, images: ImagePolicy, where: str) -> Converted:
    """Bring an image into its final form; a file that already has it is passed on unchanged.

    Each file is decoded to its end, so that damaged ones are found; one that is passed on only as well as its hash
    needs.

    Args:
        where: names the image in errors.

    Raises:
        Rejected: with the reason.
    """
    if not raw:
        raise Rejected("image file empty")
    try:
        with open_image(raw, where) as image:
            is_plain = _is_plain(image)
            if is_plain and _scaled(image.size, images.short_side_px) == image.size:
                size, suffix = image.size, _PLAIN_FORMATS[str(image.format)]
                # Eighths of the coefficients: libjpeg still reads every bit, but computes a 64th of the pixels.
                image.draft(None, (size[0] // 8, size[1] // 8))
                return Converted(raw, suffix, *size, perceptual_hash(_thinned(image)))
            pixels = _decode_fast(raw, image, images) if is_plain else None
            if pixels is None:
                pixels = _flat_pixels(image, images.short_side_px)
    except ImageTooLarge:
        raise Rejected("image has too many pixels") from None
    except DataError:
        raise Rejected("image cannot be decoded") from None
    pixels = scaled_down(pixels, _scaled((pixels.shape[1], pixels.shape[0]), images.short_side_px))
    content, suffix = _encoded(pixels, images)
    return Converted(content, suffix, pixels.shape[1], pixels.shape[0], perceptual_hash(pixels))


def scaled_down(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """A smaller picture, close to what Pillow's antialiased bicubic filter gives (45 to 53 dB), in a fifth of its time.

    A Gaussian takes out what the smaller grid cannot hold, and a cubic reads between the pixels, both in whole numbers.
    Its width was fitted to Pillow's filter on photographs, for scales of 1.05 to 3. cv2.INTER_AREA, which img2dataset
    uses, is three times slower and further off (42 to 49 dB).

    Args:
        pixels: RGB, (height, width, 3).
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
    """True if its pixels are already upright, opaque and RGB or gray, in a format that is read everywhere."""
    return (
        image.format in _PLAIN_FORMATS
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and read_orientation(image) == 1
    )


def _decode_fast(raw: bytes, image: Image.Image, images: ImagePolicy) -> Pixels | None:
    """The pixels of a JPEG, at a half, a quarter or an eighth where that leaves twice what is needed; None: use Pillow.

    Anything that libjpeg only warns about is left to Pillow, which knows harmless from truncated.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    width, height = _scaled(image.size, 2 * images.short_side_px)
    try:
        decoded: Pixels = simplejpeg.decode_jpeg(
            raw, "RGB", min_height=height, min_width=width, min_factor=2.0, strict=True
        )
    except ValueError:
        return None
    return decoded


def _flat_pixels(image: Image.Image, short_side_px: int) -> Pixels:
    """The upright, opaque RGB pixels. Large pictures are reduced to more than scaled_down averages over, in strips."""
    if image.width * image.height <= _LARGE_PIXELS:
        return np.asarray(to_rgb(image))
    image.load()
    reduced_px = math.ceil(_MAX_GAUSSIAN_SCALE * min(_scaled(image.size, short_side_px))) + 1
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


def _thinned(image: Image.Image) -> Pixels:
    """The pixels that perceptual_hash reads of an image, RGB."""
    step = _hash_step(image.size)
    rows = max(1, _STRIP_PIXELS // (image.width * step)) * step
    image.load()
    strips = (image.crop((0, top, image.width, min(image.height, top + rows))) for top in range(0, image.height, rows))
    return np.concatenate([np.asarray(strip.convert("RGB"))[::step, ::step].copy() for strip in strips])


def _scaled(size: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """Width and height with that short side, never larger than they were; 0: as they are."""
    if not short_side_px or min(size) <= short_side_px:
        return size
    longer = max(short_side_px, round(max(size) * short_side_px / min(size)))
    return (longer, short_side_px) if size[0] >= size[1] else (short_side_px, longer)


def _encoded(pixels: Pixels, images: ImagePolicy) -> tuple[bytes, str]:
    if images.lossless:
        stream = io.BytesIO()
        # zlib's strongest level takes four times as long for 4 % fewer bytes.
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue(), "png"
    if max(pixels.shape) > _MAX_JPEG_SIDE_PX:
        raise Rejected(f"image longer than {_MAX_JPEG_SIDE_PX:,} pixels")
    # Half the resolution for colours, as in nearly all photographs on the web: a fifth fewer bytes, decoded faster.
    content = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=images.jpeg_quality, colorspace="RGB", colorsubsampling="420"
    )
    return bytes(content), "jpg"


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that copies of a picture share, whatever their size and compression: mostly all, seldom fewer than 60.

    Which of the lowest 8 x 8 frequencies (discrete cosine transform of the picture at 32 x 32 gray levels) are above
    their median: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010.

    Args:
        pixels: RGB, (height, width, 3).
    """
    step = _hash_step(pixels.shape[:2])
    gray = cv2.cvtColor(np.ascontiguousarray(pixels[::step, ::step]), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (_HASH_INPUT_PX, _HASH_INPUT_PX), interpolation=cv2.INTER_AREA)
    waves = _waves()
    # Whole numbers below 2^53, so that no machine rounds otherwise.
    low = (waves @ small.astype(np.float64) @ waves.T).ravel()
    middle = np.sort(low)[31:33].mean()
    is_above = low > middle
    return int.from_bytes(np.packbits(is_above).tobytes(), "big")


def _hash_step(size: tuple[int, ...]) -> int:
    """Of a large picture every second or third pixel is enough to average."""
    return max(1, min(size) // _HASH_DENSE_PX)


@lru_cache
def _waves() -> npt.NDArray[np.float64]:
    """The first rows of the cosine transform, times 2^14: frequency by position."""
    frequency = np.arange(_HASH_SIDE)[:, None]
    position = np.arange(_HASH_INPUT_PX)[None, :]
    waves = np.cos(np.pi * frequency * (2 * position + 1) / (2 * _HASH_INPUT_PX))
    return np.asarray(np.rint(waves * 2**14), np.float64)
