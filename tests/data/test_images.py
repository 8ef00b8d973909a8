"""The tensor that the model reads equals the reference's transform of the same file."""

from __future__ import annotations

import struct

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from bridgetower.data.images import load_image
from bridgetower.errors import DataError
from bridgetower.shards.decode import ImageTooLarge, decode_image
from tests.shards.test_decode import with_orientation
from tests.small_corpora import draw, file_of

SIZES = [(40, 40), (64, 48), (48, 64), (101, 67), (500, 60), (33, 200), (20, 20), (17, 9), (1, 1), (72, 200), (640, 10)]


def textured(width: int, height: int) -> Image.Image:
    """An image with fine detail everywhere, so that a crop that is off by one pixel differs."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 2) * np.cos(y / 3), np.sin((x + y) / 4), np.cos(x / 5 - y / 2)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


def reference(image: Image.Image, side_px: int) -> np.ndarray:
    """The published pipeline: torchvision's transforms on a Pillow image."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(side_px, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side_px),
        ]
    )
    return np.asarray(pipeline(image)).astype(int)


def loaded(raw: bytes, side_px: int) -> np.ndarray:
    tensor = load_image(raw, side_px, "the sample")
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, side_px, side_px) and tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side_px", [40, 72])
def test_resize_and_crop_are_those_of_the_reference(size, side_px):
    image = textured(*size)
    difference = abs(loaded(file_of(image), side_px) - reference(image, side_px))
    assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (101, 67)])
@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_decoded_as_pillow_does(size, options):
    raw = file_of(textured(*size), "JPEG", **options)
    difference = abs(loaded(raw, 40) - reference(decode_image(raw, "x"), 40))
    assert difference.max() <= 4 and difference.mean() < 0.6


@pytest.mark.parametrize("size", [(400, 300), (333, 500), (640, 427), (1280, 960)])
def test_a_large_jpeg_is_decoded_at_reduced_scale_and_hardly_differs(size):
    # A photograph, as libjpeg's reduced transforms and Pillow's filter differ on noise.
    portrait = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    photo = portrait.crop((0, 0, 512, 600)).resize(size, Image.Resampling.BICUBIC)
    raw = file_of(photo, "JPEG", quality=95)
    expected = reference(decode_image(raw, "x"), 72)
    difference = loaded(raw, 72) - expected
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 45
    exact = load_image(raw, 72, "the sample", exact=True).permute(1, 2, 0).numpy().astype(int)
    assert abs(exact - expected).max() <= 2 < abs(difference).max()


def test_an_image_can_be_decoded_into_a_given_tensor():
    raw, ring = file_of(textured(64, 48)), torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    returned = load_image(raw, 40, "the sample", out=ring[1])
    assert torch.equal(ring[1], load_image(raw, 40, "the sample")) and returned.data_ptr() == ring[1].data_ptr()
    assert not ring[0].any()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpegs_are_read_as_rgb(mode):
    image = draw(2, 60, 44)
    raw = file_of(image.convert(mode), "JPEG", quality=98, subsampling=0)
    expected = reference(image.convert(mode).convert("RGB"), 40)
    assert abs(loaded(raw, 40) - expected).max() <= 8


def test_a_transparent_png_is_shown_on_white():
    assert (loaded(file_of(Image.new("RGBA", (50, 50), (0, 0, 0, 0))), 40) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_upright(orientation):
    raw = with_orientation(textured(64, 44), orientation, "JPEG")
    assert abs(loaded(raw, 40) - reference(decode_image(raw, "x"), 40)).max() <= 4


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_that_names_the_sample(format_name):
    raw = file_of(textured(64, 64), format_name)
    with pytest.raises(DataError, match=r"The image of 00012.tar, sample 5 cannot be decoded"):
        load_image(raw[: len(raw) * 2 // 3], 40, "00012.tar, sample 5")


def test_a_jpeg_that_claims_to_be_huge_is_refused_before_memory_is_allocated():
    # torchvision would allocate the 13 GB that these 700 bytes claim.
    raw = file_of(draw(0), "JPEG")
    frame = raw.index(b"\xff\xc0")
    bomb = raw[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + raw[frame + 9 :]
    with pytest.raises(ImageTooLarge, match="the sample"):
        load_image(bomb, 40, "the sample")


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_of_pixels_is_cut_before_it_is_resized(turned):
    # Resizing the whole line would give 288 x 57,600,000 pixels: 50 GB. Its left half is black, its right half white.
    line = Image.new("L", (200_000, 1))
    line.paste(255, (100_000, 0, 200_000, 1))
    pixels = loaded(file_of(line.transpose(Image.Transpose.ROTATE_90) if turned else line), 288)
    across = pixels[:, :, 0].mean(axis=1)[::-1] if turned else pixels[:, :, 0].mean(axis=0)
    assert across[0] < 20 and across[-1] > 235
    assert across.mean() == pytest.approx(127.5, abs=3)
