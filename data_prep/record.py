"""What a source yields: input rows with everything known about them, before the bytes of an image are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """Where the bytes of an image lie: a file, or a part of one."""

    path: Path
    """Local, or in an object store (bridgetower.io.storage.to_path)."""
    offset: int = 0
    num_bytes: int = -1
    """For a member of a tar, its place in it; -1: the whole file."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """An image (NLVR2: two) with one text or more. Reading and converting it is left to the worker of its shard.

    A source may give an image as several records, in any order: those of the same split and key become one sample, with
    the texts in the order in which they came. Their images, image ids and meta have to be equal.
    """

    key: str
    """Names the sample in its split; letters, digits, ``_`` and ``-`` (bridgetower.shards.sample.safe_key)."""
    image: ImageFile
    second_image: ImageFile | None = None
    image_id: str
    """Equal for the same picture; empty: a hash of the image file."""
    captions: tuple[str, ...]
    """The texts: captions, questions, hypotheses. As their owner published them; the writer normalises them."""
    annotations: tuple[Mapping[str, Any], ...] = ()
    """What belongs to each text, in the same order (answers, labels, ids), or nothing. Ends up in the sample's json."""
    split: str = ""
    """Each split becomes a corpus folder of its own below --out; empty: --out itself."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the image: ``coco_id``, ``url``. Ends up in the sample's json."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Input rows that a source itself drops, so that they are counted: an SNLI-VE pair without a gold label."""

    reason: str
    """A few words that name a kind of reason, not the row: they are counted together and shown to people."""
    rows: int = 1
    split: str = ""


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
    flags: Mapping[str, str] = field(default_factory=dict)
    """The source's own flags (its FLAGS), those that were given."""
