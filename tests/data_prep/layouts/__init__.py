"""Miniatures of the corpora as their owners publish them: official file names, real JSON shapes, small drawn images.

Each module has ``write(folder)``, which writes the files and returns the counts that a build should have, by split.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Counts that the build of one split should have: rows = captions + the sum of rejects."""

    rows: int
    images: int
    captions: int
    rejects: dict[str, int] = field(default_factory=dict)


def make_image_file(number: int, size: tuple[int, int] = (64, 48), format_name: str = "JPEG") -> bytes:
    """Make an image file that looks like no other: coarse noise, a different one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, format_name)
    return stream.getvalue()


def put(path: Path, content: bytes | str) -> None:
    """Write a file, and make its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
