"""Unusual image files get the pixels in a shard that their formats define, computed here with numpy alone."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.convert import convert
from data_prep.record import ImagePolicy
from tests.small_corpora import file_of

Array = npt.NDArray[np.float64]

WHITE = 255.0
COLOURS = [(200, 30, 40), (20, 180, 60), (40, 50, 220), (230, 210, 20), (30, 200, 210), (120, 60, 140)]
GRAY, RGB, GRAY_ALPHA, RGB_ALPHA, PALETTE = 0, 2, 4, 6, 3  # colour types of PNG


def stored(raw: bytes, *, short_side_px: int = 0, lossless: bool = True) -> Array:
    """Convert an image file. Returns: the pixels that a reader of the shard sees, (height, width, 3)."""
    converted = convert(raw, ImagePolicy(short_side_px=short_side_px, lossless=lossless), "the test")
    image = Image.open(io.BytesIO(converted.content))
    assert image.size == (converted.width_px, converted.height_px)
    return np.asarray(image.convert("RGB"), np.float64)


def png(depth: int, colour_type: int, pixels: npt.NDArray[np.uint16], **chunks: bytes) -> bytes:
    """Write a PNG by hand from values of this bit depth, (height, width) or (height, width, channels)."""
    rows = [b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    all_chunks = {"IHDR": header, **chunks, "IDAT": zlib.compress(b"".join(rows)), "IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in all_chunks.items():
        tag = name.encode()
        content += struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    return content


def noise_16(*shape: int) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 65_536, shape, np.uint16)


def patches(columns: int, rows: int, side_px: int = 16) -> npt.NDArray[np.uint8]:
    """Draw squares of different COLOURS, as large as the blocks in which JPEG stores colours."""
    squares = np.array(COLOURS[: columns * rows], np.uint8).reshape(rows, columns, 3)
    return squares.repeat(side_px, axis=0).repeat(side_px, axis=1)


def middles(pixels: Array, side_px: int) -> Array:
    """Return the pixel in the middle of each square: JPEG and scaling mix colours at the edges."""
    return pixels[side_px // 2 :: side_px, side_px // 2 :: side_px]


def over_white(rgb: Array, opacity: Array) -> Array:
    return rgb * opacity[..., None] + WHITE * (1 - opacity[..., None])


def test_16_bit_gray_is_stored_as_its_upper_8_bits():
    gray = noise_16(9, 14)
    assert np.array_equal(stored(png(16, GRAY, gray)), np.stack([gray // 256] * 3, axis=-1))


def test_one_level_of_16_bit_gray_may_be_transparent():
    gray = noise_16(9, 14)
    gray[2:5], gray[6, :7], gray[6, 7:] = 40_000, 40_001, 39_999  # only the first rows have that level
    expected = np.stack([gray // 256] * 3, axis=-1)
    expected[2:5] = 255
    assert np.array_equal(stored(png(16, GRAY, gray, tRNS=struct.pack(">H", 40_000))), expected)


def test_16_bit_gray_is_scaled_down_by_averages():
    gray = np.linspace(0, 65_535, 400).astype(np.uint16)[None].repeat(300, axis=0)
    found = stored(png(16, GRAY, gray), short_side_px=75)
    expected = (gray // 256)[::4].reshape(75, 100, 4).mean(axis=-1)
    assert np.abs(found - expected[..., None]).max() < 2


def test_16_bit_rgb_reads_as_its_upper_8_bits():
    rgb = noise_16(9, 14, 3)
    assert np.array_equal(stored(png(16, RGB, rgb)), rgb // 256)


def test_one_colour_of_16_bit_rgb_may_be_transparent():
    rgb = noise_16(9, 14, 3)
    rgb[2:5] = 40_000, 300, 50_000
    expected = rgb // 256
    expected[2:5] = 255
    assert np.array_equal(stored(png(16, RGB, rgb, tRNS=struct.pack(">HHH", 40_000, 300, 50_000))), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_with_an_alpha_channel_are_put_on_white(channels):
    rgba = noise_16(9, 14, channels + 1)
    expected = over_white(rgba[..., :channels] / 257 * np.ones(3), rgba[..., channels] / 65_535)
    found = stored(png(16, GRAY_ALPHA if channels == 1 else RGB_ALPHA, rgba))
    assert np.abs(found - expected).max() <= 2


def test_a_palette_with_an_opacity_for_each_colour_is_put_on_white():
    opacity = [255, 128, 0, 51]  # the other two are opaque
    index = np.random.default_rng(0).integers(0, len(COLOURS), (9, 14)).astype(np.uint16)
    raw = png(8, PALETTE, index, PLTE=np.array(COLOURS, np.uint8).tobytes(), tRNS=bytes(opacity))
    table = over_white(np.array(COLOURS, np.float64), np.array([*opacity, 255, 255]) / 255)
    assert np.abs(stored(raw) - table[index]).max() <= 1


@pytest.mark.parametrize("lossless", [True, False])
def test_a_cmyk_jpeg_has_the_colours_of_its_inks_on_white_paper(lossless):
    # Ink absorbs light: a channel has the light that neither its ink nor black covers.
    inks = np.array([(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 0, 0), (0, 0, 180, 60), (30, 90, 0, 120), (0, 0, 0, 255)])
    pixels = inks.reshape(2, 3, 4).repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
    raw = file_of(Image.fromarray(pixels, "CMYK"), "JPEG", quality=100, subsampling=0)
    ink, black = inks[:, :3] / 255, inks[:, 3:] / 255
    expected = (255 * (1 - ink) * (1 - black)).reshape(2, 3, 3)
    # JPEG rounds colours several times, and once more if the result is stored as a JPEG again.
    assert np.abs(middles(stored(raw, lossless=lossless), 16) - expected).max() <= (3 if lossless else 6)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("short_side_px", [0, 16])
def test_an_animated_image_is_its_first_frame(format_name, short_side_px):
    frames = [np.roll(patches(3, 2), shift, axis=0) for shift in (0, 7, 13)]
    first, *others = map(Image.fromarray, frames)
    options = {"lossless": True} if format_name == "WEBP" else {}
    raw = file_of(first, format_name, save_all=True, append_images=others, duration=40, **options)
    assert getattr(Image.open(io.BytesIO(raw)), "n_frames", 1) == 3
    found = stored(raw, short_side_px=short_side_px)
    if short_side_px:
        assert np.abs(middles(found, 8) - np.array(COLOURS).reshape(2, 3, 3)).max() <= 1
    else:
        assert np.array_equal(found, frames[0])


def test_an_animated_gif_whose_first_frame_is_transparent_is_put_on_white():
    index = np.zeros((8, 12), np.uint8)
    index[:, 6:] = 1
    frames = [Image.fromarray(np.roll(index, shift, axis=1), "P") for shift in (0, 3)]
    for frame in frames:
        frame.putpalette([value for colour in COLOURS for value in colour])
    raw = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0, disposal=2)
    found = stored(raw)
    assert (found[:, :6] == WHITE).all() and (found[:, 6:] == COLOURS[1]).all()


# EXIF 2.3, table 6: the sides of the image at which the first stored row and column are.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],  # row 0 is the top, column 0 the right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("short_side_px", [0, 16])
def test_a_jpeg_that_a_camera_stored_rotated_is_turned_upright(orientation, short_side_px):
    pixels = patches(3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = file_of(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, exif=exif)
    expected = UPRIGHT[orientation](pixels)
    side_px = 8 if short_side_px else 16
    found = stored(raw, short_side_px=short_side_px, lossless=False)
    assert found.shape == (expected.shape[0] * side_px // 16, expected.shape[1] * side_px // 16, 3)
    assert np.abs(middles(found, side_px) - middles(expected, 16)).max() <= 12  # the squares differ by at least 70
