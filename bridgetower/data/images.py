"""From image bytes to the square uint8 tensor the model reads.

The rule is the reference's ``clip`` transform: shorter side to S (bicubic, antialiased), centre crop S x S, RGB.
torchvision does it on uint8 in a quarter of Pillow's time and within 2 levels of it; normalisation is left to the
device, so that a quarter of the bytes cross to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bridgetower.data.picture import open_picture, opened

# Of longer images the ends are cut off before the resize: far from the centre crop, and of no size at all.
_MAX_ASPECT = 64


def load_image(raw: bytes, side_px: int, where: str) -> Tensor:
    """Decode, resize and crop one image.

    Args:
        raw: the file's content: JPEG, PNG or WebP.
        side_px: S.
        where: names the sample in errors.

    Returns: uint8, shape (3, S, S).

    Raises:
        DataError: the bytes are not an image, or one of too many pixels.
    """
    return _fit(_decode(raw, where), side_px)


def _decode(raw: bytes, where: str) -> Tensor:
    if raw[:2] == b"\xff\xd8":
        with opened(raw, where):
            pass  # reads the header: torchvision would allocate whatever size it claims
        try:
            data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            decoded: Tensor = decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return decoded
        except RuntimeError:
            pass  # CMYK, arithmetic coding and other rarities: Pillow reads more of them, or says what is wrong
    drawn: Tensor = F.pil_to_tensor(open_picture(raw, where))
    return drawn


def _fit(image: Tensor, side_px: int) -> Tensor:
    height, width = image.shape[-2:]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        # Resized whole, a line of 20,000 x 1 pixels would take gigabytes. The same is cut off at both ends.
        longest += (max(height, width) - longest) % 2
        height, width = min(height, longest), min(width, longest)
        image = F.center_crop(image, [height, width])
    if min(height, width) != side_px:
        image = F.resize(image, [side_px], interpolation=InterpolationMode.BICUBIC, antialias=True)
    if image.shape[-2:] != (side_px, side_px):
        image = F.center_crop(image, [side_px, side_px])
    return image.contiguous()
