"""Miniatures of what the owners of the corpora publish: official file names, real JSON shapes, small drawn pictures.

Each module has ``write(folder)``, which makes the files and returns what a build of them has to give, by split.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A split of a build: rows = captions + the sum of rejects."""

    rows: int
    images: int
    captions: int
    rejects: dict[str, int] = field(default_factory=dict)


def picture(number: int, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    """A picture file that looks like no other: coarse noise of that seed."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def put(path: Path, content: bytes | str) -> None:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
