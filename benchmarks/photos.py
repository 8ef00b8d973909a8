"""Real photographs for benchmarks: cut from those that scikit-image carries, at the sizes of the corpora."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bridgetower.errors import ConfigError

SIZES = {"500x375": (500, 375), "640x480": (640, 480), "1024x768": (1024, 768)}
"""Flickr and SBU, COCO and VG, larger pictures of the web."""


def cut_photos(size: tuple[int, int], count: int, *, seed: int = 0) -> list[bytes]:
    """JPEGs of quality 90.

    Args:
        size: width and height.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ConfigError("The benchmark cuts its photographs from scikit-image's: pip install scikit-image") from error
    photos = [Image.fromarray(photo()) for photo in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    random = np.random.default_rng(seed)
    cuts = []
    for number in range(count):
        photo = photos[number % len(photos)]
        scale = max(size[0] / photo.width, size[1] / photo.height) * random.uniform(1.0, 1.3)
        large = photo.resize((int(photo.width * scale) + 1, int(photo.height * scale) + 1), Image.Resampling.BICUBIC)
        left, top = (int(random.integers(0, room + 1)) for room in (large.width - size[0], large.height - size[1]))
        stream = io.BytesIO()
        large.crop((left, top, left + size[0], top + size[1])).save(stream, "JPEG", quality=90)
        cuts.append(stream.getvalue())
    return cuts
