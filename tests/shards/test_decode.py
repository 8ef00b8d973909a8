"""Every kind of image file becomes upright, opaque RGB, or an error that names the file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from bridgetower.errors import DataError
from bridgetower.shards.decode import MAX_IMAGE_PIXELS, ImageTooLarge, decode_image
from tests.small_corpora import draw, file_of, png_that_claims

ORIENTATION = 0x0112


def pixels(raw: bytes) -> np.ndarray:
    return np.asarray(decode_image(raw, "the image")).astype(int)


def with_orientation(image: Image.Image, orientation: int, format_name: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 98, "subsampling": 0} if format_name == "JPEG" else {}
    return file_of(image, format_name, exif=exif, **options)


def test_a_transparent_image_is_shown_on_white():
    image = np.zeros((1, 3, 4), np.uint8)
    image[0] = [(200, 100, 0, 255), (200, 100, 0, 128), (200, 100, 0, 0)]
    found = pixels(file_of(Image.fromarray(image)))
    assert found[0, 0].tolist() == [200, 100, 0]
    # 200 * 128 / 255 + 255 * 127 / 255
    assert abs(found[0, 1] - [227, 177, 127]).max() <= 1
    assert found[0, 2].tolist() == [255, 255, 255]


def test_the_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert pixels(file_of(image, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_a_palette_without_transparency_keeps_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert pixels(file_of(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparent_gray_is_shown_on_white():
    image = np.array([[[90, 255], [90, 0]]], np.uint8)
    assert pixels(file_of(Image.fromarray(image, "LA"))).tolist() == [[[90] * 3, [255] * 3]]


def test_black_and_white_images_are_black_and_white():
    assert pixels(file_of(Image.new("1", (1, 1), 0)))[0, 0].tolist() == [0, 0, 0]
    assert pixels(file_of(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_8_bits(format_name):
    image = Image.fromarray(np.array([[0, 255, 256, 20_000, 65_535]], np.uint16))
    assert pixels(file_of(image, format_name))[0, :, 0].tolist() == [0, 0, 1, 78, 255]


def test_a_cmyk_jpeg_has_the_colours_of_its_rgb_original():
    original = draw(1, 40, 30)
    raw = file_of(original.convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert abs(pixels(raw) - np.asarray(original).astype(int)).max() <= 8


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation, format_name):
    stored = draw(3, 30, 20)
    raw = with_orientation(stored, orientation, format_name)
    tagged = stored.copy()
    tagged.getexif()[ORIENTATION] = orientation
    upright = np.asarray(ImageOps.exif_transpose(tagged)).astype(int)
    found = pixels(raw)
    assert found.shape == upright.shape
    # The image is a ramp to the right and downwards: turned wrongly, it differs by tens of levels on average.
    assert abs(found - upright).mean() < 6


def test_an_image_with_damaged_exif_data_is_kept_and_not_turned():
    raw = with_orientation(draw(3, 30, 20), 6, "JPEG")
    start = raw.index(b"Exif\0\0")
    damaged = raw[: start + 6] + b"\xff" * 12 + raw[start + 18 :]
    assert pixels(damaged).shape == (20, 30, 3)


def test_an_image_whose_exif_data_contradict_themselves_is_turned_nevertheless():
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "a description"
    raw = file_of(draw(3, 30, 20), "JPEG", exif=exif)
    start = raw.index(b"Exif\0\0")
    # The tag of the description becomes that of the width, a number: Pillow reads it, but cannot write it back.
    contradictory = raw[:start] + raw[start:].replace(b"\x01\x0e", b"\x01\x00", 1)
    assert contradictory != raw
    assert pixels(contradictory).shape == (30, 20, 3)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_an_error_that_names_it(format_name):
    raw = file_of(draw(1, 64, 64), format_name)
    with pytest.raises(DataError, match="The image of shard 7, sample 3 cannot be decoded"):
        decode_image(raw[: len(raw) // 2], "shard 7, sample 3")


@pytest.mark.parametrize("raw", [b"", b"<html>404</html>", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
def test_what_is_not_an_image_is_an_error(raw):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(raw, "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [10_001, 60_000])
def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(width):
    # Pillow itself refuses above twice this limit, and only warns below.
    raw = png_that_claims(width, 9_000)
    assert len(raw) < 200 and width * 9_000 > MAX_IMAGE_PIXELS
    with pytest.raises(ImageTooLarge, match="89,478,485"):
        decode_image(raw, "x")


def damaged_files() -> st.SearchStrategy[bytes]:
    """Images of many formats with some bytes changed and their end cut off."""
    image, exif = draw(5, 24, 20), Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "a description"
    files = [file_of(image, name, exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [file_of(image.convert("P"), "GIF"), file_of(image.convert("RGBA"), "PNG"), file_of(image, "BMP")]

    def damage(case: tuple[bytes, list[tuple[int, int]], int]) -> bytes:
        raw, changes, cut = bytearray(case[0]), case[1], case[2]
        for offset, value in changes:
            raw[offset % len(raw)] = value
        return bytes(raw[: len(raw) - cut])

    changes = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=6)
    return st.tuples(st.sampled_from(files), changes, st.sampled_from([0, 0, 0, 10])).map(damage)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata
@settings(derandomize=True, deadline=None, max_examples=400)
@given(damaged_files())
def test_a_damaged_file_is_an_image_or_an_error_made_for_people(raw):
    try:
        image = decode_image(raw, "the image")
    except DataError as error:
        assert "the image" in str(error)
    else:
        assert image.mode == "RGB"
