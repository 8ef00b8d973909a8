"""Real photographs for benchmarks, cut from scikit-image's, in the sizes of the corpora."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bridgetower.errors import ConfigError

SIZES = {"500x375": (500, 375), "640x480": (640, 480), "1024x768": (1024, 768)}
"""Width and height of typical photographs: Flickr and SBU, COCO and VG, larger images of the web."""


def cut_photos(size: tuple[int, int], count: int, *, seed: int = 0) -> list[bytes]:
    """Return JPEGs of quality 90.

    Args:
        size: width and height.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ConfigError(
            "The benchmark cuts its photographs from scikit-image's, which is not installed: pip install scikit-image"
        ) from error
    photos = [Image.fromarray(photo()) for photo in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    random = np.random.default_rng(seed)
    cuts = []
    for index in range(count):
        photo = photos[index % len(photos)]
        scale = max(size[0] / photo.width, size[1] / photo.height) * random.uniform(1.0, 1.3)
        large = photo.resize((int(photo.width * scale) + 1, int(photo.height * scale) + 1), Image.Resampling.BICUBIC)
        left, top = (
            int(random.integers(0, spare_px + 1)) for spare_px in (large.width - size[0], large.height - size[1])
        )
        stream = io.BytesIO()
        large.crop((left, top, left + size[0], top + size[1])).save(stream, "JPEG", quality=90)
        cuts.append(stream.getvalue())
    return cuts
