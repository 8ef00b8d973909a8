"""From image bytes to the square uint8 tensor the model reads.

For pretraining the rule is the reference's ``clip`` transform: shorter side to S (bicubic, antialiased), centre crop
S x S, RGB. For fine-tuning it is its ``blip``: the whole picture, or a random crop of it, squashed to S x S. Here
it works on uint8, in a quarter of Pillow's time and within 2 of its 255 levels (69 dB or better on photographs). JPEGs
of at least four times the side are decoded at a half or fewer eighths, which is 46 to 54 dB from Pillow; ``exact``
never does. Normalisation is left to the device, so that a quarter of the bytes cross to it.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from bridgetower.data.augment import Augmentation
from bridgetower.shards.decode import MAX_IMAGE_PIXELS, decode_image

# Of longer images the ends are cut off before the resize: far from the centre crop, and of no size at all.
_MAX_ASPECT = 64
# A reduced picture has at least this times the side, so that the antialiased resize still decides what is seen.
_MIN_OVERSIZE = 2
# Where cameras say how they were held; it is in one of the first segments.
_EXIF_MARK, _EXIF_WITHIN_BYTES = b"Exif\0\0", 65_536


def load_image(raw: bytes, side_px: int, where: str, *, exact: bool = False, out: Tensor | None = None) -> Tensor:
    """Decode, resize and crop one image.

    Args:
        raw: the file's content: JPEG, PNG or WebP.
        side_px: S.
        where: names the sample in errors.
        exact: never decode at reduced scale.
        out: where to write it, or None.

    Returns: uint8, shape (3, S, S); ``out`` if there is one.

    Raises:
        DataError: the bytes are not an image, or one of too many pixels.
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
    """Decode one image and squash it to a square, whatever its shape, for fine-tuning.

    Args:
        raw: the file's content: JPEG, PNG or WebP.
        side_px: S.
        where: names the sample in errors.
        augmentation: of a training picture: what is cropped first and changed last. It is decoded in full.
        exact: never decode at reduced scale.
        out: where to write it, or None.

    Returns: uint8, shape (3, S, S); ``out`` if there is one.

    Raises:
        DataError: the bytes are not an image, or one of too many pixels.
    """
    reduces = augmentation is None and not exact
    image, height, width = _decode(raw, side_px * _MIN_OVERSIZE if reduces else 0, where)
    if augmentation is not None:
        crop = augmentation.crop(height, width)
        height, width = crop.height, crop.width
        image = image[..., crop.top : crop.top + height, crop.left : crop.left + width]
    # libjpeg reduces to eighths and rounds up: the last pixel may be half outside of the picture.
    reduction = 8 / round(8 * max(image.shape[-2:]) / max(height, width))
    scales = (side_px * reduction / height, side_px * reduction / width)
    size = (side_px, side_px)
    if tuple(image.shape[-2:]) != size:
        image = torch.ops.aten._upsample_bicubic2d_aa(image[None], size, False, *scales)[0]
    if augmentation is not None:
        changed = augmentation.change(image.permute(1, 2, 0).contiguous().numpy())
        image = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
    return image.contiguous() if out is None else out.copy_(image)


def _decode(raw: bytes, enough_px: int, where: str) -> tuple[Tensor, int, int]:
    """RGB, (3, height, width), and the height and width that the file says.

    Args:
        enough_px: a JPEG may be decoded smaller, but not below this short side; 0: as it is.
    """
    if raw[:2] == b"\xff\xd8" and raw.find(_EXIF_MARK, 0, _EXIF_WITHIN_BYTES) < 0:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
            # Whatever size it claims would be allocated. What is in CMYK is left to Pillow.
            if height * width <= MAX_IMAGE_PIXELS and colours in ("YCbCr", "Gray", "RGB"):
                may_reduce = enough_px and max(height, width) <= _MAX_ASPECT * min(height, width)
                enough = enough_px / min(height, width) if may_reduce else 0.0
                pixels = simplejpeg.decode_jpeg(
                    raw, "RGB", min_height=round(height * enough), min_width=round(width * enough), min_factor=2.0
                )
                return torch.from_numpy(pixels).permute(2, 0, 1), height, width
        except ValueError:
            pass  # Pillow reads more of the rarities, or says what is wrong
    drawn = torch.from_numpy(np.array(decode_image(raw, where))).permute(2, 0, 1)
    return drawn, drawn.shape[1], drawn.shape[2]


def _fit(image: Tensor, height: int, width: int, side_px: int) -> Tensor:
    """Resize and crop an image whose size was that, before it was decoded at reduced scale."""
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        # Resized whole, a line of 20,000 x 1 pixels would take gigabytes. The same is cut off at both ends.
        longest += (max(height, width) - longest) % 2
        height, width = min(height, longest), min(width, longest)
        image = _center(image, height, width)
    if min(image.shape[-2:]) != side_px:
        # The sizes that torchvision computes of the whole picture, without its overhead.
        size = (side_px * height // min(height, width), side_px * width // min(height, width))
        # libjpeg reduces to eighths and rounds up: the last pixel may be half outside of the picture.
        reduction = 8 / round(8 * max(image.shape[-2:]) / max(height, width))
        scales = (size[0] * reduction / height, size[1] * reduction / width)
        image = torch.ops.aten._upsample_bicubic2d_aa(image[None], size, False, *scales)[0]
    if image.shape[-2:] != (side_px, side_px):
        image = _center(image, side_px, side_px)
    return image


def _center(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of a larger image, where torchvision's center_crop finds it (whose import takes a second)."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]
