"""Any picture file as upright, opaque, 8-bit RGB, with Pillow. Never imports torch."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from bridgetower.errors import DataError

# A picture of more pixels is refused before it is decoded: a small file can claim to be one of many gigabytes.
MAX_IMAGE_PIXELS = 89_478_485

_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def open_picture(raw: bytes, where: str) -> Image.Image:
    """Decode a picture and bring it to RGB.

    Args:
        raw: the file's content, in any format that Pillow reads.
        where: names the picture in errors.

    Raises:
        DataError: it cannot be decoded, or is larger than MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"The image of {where} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS:,}: "
                    "refused, as small files can claim to be huge. Scale it down first."
                )
            return flatten(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"The image of {where} cannot be decoded ({error}).") from error


def flatten(image: Image.Image) -> Image.Image:
    """Turn a Pillow image upright, over white where it is transparent, and to 8-bit RGB.

    White, not the black that lies under transparent pixels in many files (which is what the reference's RGBA -> RGB
    conversion shows): drawings are made for a light page.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grayscale: Pillow's own conversion would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image.convert("RGB")
