"""From image bytes to the square uint8 tensor that the model reads.

Pretraining follows the reference's ``clip`` transform: resize the shorter side to S (bicubic, antialiased), crop the
centre S x S, RGB. Fine-tuning follows its ``blip`` transform: squash the whole image, or a random crop of it, to S x S.

Both work on uint8 here, which takes a quarter of Pillow's time and stays within 2 of its 255 levels (69 dB or better on
photographs). JPEGs with at least four times the side are decoded at half scale or less, which is 46 to 54 dB from
Pillow, unless ``exact`` is set. Normalisation is left to the device, so that a quarter of the bytes are copied to it.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from bridgetower.data.augment import Augmentation
from bridgetower.shards.decode import MAX_IMAGE_PIXELS, decode_image

# Longer images lose their ends before the resize. These lie far outside of the centre crop, and would take gigabytes.
_MAX_ASPECT = 64
# A JPEG decoded at reduced scale has at least this multiple of the side, so that the antialiased resize still decides
# what the model sees.
_MIN_OVERSIZE = 2
# EXIF data, which say how the camera was held, are in one of the first segments.
_EXIF_MARK, _EXIF_WITHIN_BYTES = b"Exif\0\0", 65_536


def load_image(raw: bytes, side_px: int, where: str, *, exact: bool = False, out: Tensor | None = None) -> Tensor:
    """Decode, resize and crop one image.

    Args:
        raw: content of the file: JPEG, PNG or WebP.
        side_px: S.
        where: name of the sample in errors.
        exact: never decode at reduced scale.
        out: tensor of shape (3, S, S) to write to, or None for a new one.

    Returns: uint8, shape (3, S, S); ``out`` if it is given.

    Raises:
        DataError: the bytes are not an image, or the image has too many pixels.
    """
    fitted = _fit(*_decode(raw, 0 if exact else side_px * _MIN_OVERSIZE, where), side_px)
    return fitted.contiguous() if out is None else out.copy_(fitted)


def load_whole_image(
    raw: bytes,
    side_px: int,
    where: str,
    *,
    augmentation: Augmentation | None = None,
    exact: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Decode one image and squash it to a square, for fine-tuning.

    Args:
        raw: content of the file: JPEG, PNG or WebP.
        side_px: S.
        where: name of the sample in errors.
        augmentation: augmentation of a training image, which is then decoded in full; it crops before the resize and
            applies its operations after it.
        exact: never decode at reduced scale.
        out: tensor of shape (3, S, S) to write to, or None for a new one.

    Returns: uint8, shape (3, S, S); ``out`` if it is given.

    Raises:
        DataError: the bytes are not an image, or the image has too many pixels.
    """
    may_reduce = augmentation is None and not exact
    image, height, width = _decode(raw, side_px * _MIN_OVERSIZE if may_reduce else 0, where)
    if augmentation is not None:
        crop = augmentation.crop(height, width)
        height, width = crop.height, crop.width
        image = image[..., crop.top : crop.top + height, crop.left : crop.left + width]
    # libjpeg scales to eighths and rounds up, so the last pixel may lie partly outside of the image.
    reduction = 8 / round(8 * max(image.shape[-2:]) / max(height, width))
    scales = (side_px * reduction / height, side_px * reduction / width)
    size = (side_px, side_px)
    if tuple(image.shape[-2:]) != size:
        image = torch.ops.aten._upsample_bicubic2d_aa(image[None], size, False, *scales)[0]
    if augmentation is not None:
        augmented = augmentation.change(image.permute(1, 2, 0).contiguous().numpy())
        image = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
    return image.contiguous() if out is None else out.copy_(image)


def _decode(raw: bytes, enough_px: int, where: str) -> tuple[Tensor, int, int]:
    """Decode an image.

    Args:
        enough_px: a JPEG may be decoded at reduced scale, but not below this shorter side; 0 decodes in full.

    Returns: RGB, uint8, shape (3, height, width), and the height and width at full scale.
    """
    if raw[:2] == b"\xff\xd8" and raw.find(_EXIF_MARK, 0, _EXIF_WITHIN_BYTES) < 0:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
            # simplejpeg allocates whatever size the header claims, and does not convert CMYK: Pillow handles both.
            if height * width <= MAX_IMAGE_PIXELS and colours in ("YCbCr", "Gray", "RGB"):
                may_reduce = enough_px and max(height, width) <= _MAX_ASPECT * min(height, width)
                enough = enough_px / min(height, width) if may_reduce else 0.0
                pixels = simplejpeg.decode_jpeg(
                    raw, "RGB", min_height=round(height * enough), min_width=round(width * enough), min_factor=2.0
                )
                return torch.from_numpy(pixels).permute(2, 0, 1), height, width
        except ValueError:
            pass  # Pillow reads more rare variants, or raises an error that explains
    image = torch.from_numpy(np.array(decode_image(raw, where))).permute(2, 0, 1)
    return image, image.shape[1], image.shape[2]


def _fit(image: Tensor, height: int, width: int, side_px: int) -> Tensor:
    """Resize and crop an image.

    Args:
        height: height at full scale; the image may have been decoded at reduced scale.
        width: width at full scale.
    """
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        # Resizing a line of 20,000 x 1 pixels would take gigabytes. Both ends are cut off, by equal lengths.
        longest += (max(height, width) - longest) % 2
        height, width = min(height, longest), min(width, longest)
        image = _center(image, height, width)
    if min(image.shape[-2:]) != side_px:
        # The size that torchvision computes for the whole image, without its overhead.
        size = (side_px * height // min(height, width), side_px * width // min(height, width))
        # libjpeg scales to eighths and rounds up, so the last pixel may lie partly outside of the image.
        reduction = 8 / round(8 * max(image.shape[-2:]) / max(height, width))
        scales = (size[0] * reduction / height, size[1] * reduction / width)
        image = torch.ops.aten._upsample_bicubic2d_aa(image[None], size, False, *scales)[0]
    if image.shape[-2:] != (side_px, side_px):
        image = _center(image, side_px, side_px)
    return image


def _center(image: Tensor, height: int, width: int) -> Tensor:
    """Crop the centre as torchvision's center_crop does, without its import, which takes a second."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]
