"""What a source yields: one input image with everything known about it, before its bytes are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image. Reading and converting it is left to the worker that writes its shard."""

    key: str
    """Unique in the corpus; letters, digits, ``_`` and ``-``."""
    image: Path
    image_id: str
    """Equal for the same picture; empty: a hash of the image file."""
    captions: tuple[str, ...]
    """As the owner published them; the writer normalises them."""
    split: str = ""
    """Each split becomes a corpus folder of its own below --out; empty: --out itself."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """What happens to the image bytes on their way into the shard."""

    short_side_px: int
    """A longer short side is scaled down to this once (never up); 0 keeps every image as it is."""
    jpeg_quality: int = 95
    lossless: bool = False
    """Images that have to be re-encoded become PNG instead of JPEG: for drawings."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The flags of build_shards.py that a source may read."""

    raw: Path | None
    """Folder with the files as their owner published them."""
    captions: Path | None
    """Caption file, for sources that have one of free name."""
