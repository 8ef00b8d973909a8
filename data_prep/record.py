"""Types that a source yields: input rows with all that is known about them before an image is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """Location of an image: a file, or a range of bytes of one."""

    path: Path
    """Local path, or one in an object store (see bridgetower.io.storage)."""
    offset: int = 0
    """First byte of the image in the file."""
    num_bytes: int = -1
    """Length of an image in a tar; -1: the whole file."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image (NLVR2: two) with its texts. The worker of its shard reads and converts the image later.

    A source may yield several records per image, in any order. Records of the same split and key become one sample,
    with the texts in the order in which they came; their images, image ids and meta have to be equal.
    """

    key: str
    """Name of the sample in its split: letters, digits, ``_`` and ``-`` (bridgetower.shards.sample.safe_key)."""
    image: ImageFile
    second_image: ImageFile | None = None
    image_id: str
    """Id that equal images share, in other corpora too; empty: a hash of the image file becomes the id."""
    captions: tuple[str, ...]
    """Texts (captions, questions, sentences or hypotheses) as published; the shard writer normalises them."""
    annotations: tuple[Mapping[str, Any], ...] = ()
    """Answers, labels and ids of each text, in the order of the texts, for the sample's json; or empty."""
    split: str = ""
    """Name of the corpus folder below --out; empty: --out itself."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the image for the sample's json, such as ``coco_id`` and ``url``."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Input rows that a source drops, such as SNLI-VE pairs without a gold label; yielded so that they are counted."""

    reason: str
    """A few words that are the same for many rows: rows are counted by reason, and the counts are shown to people."""
    rows: int = 1
    """Number of rows."""
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How images are converted on their way into the shard."""

    short_side_px: int
    """Length to which longer short sides are scaled down (shorter ones never up); 0: images keep their size."""
    jpeg_quality: int = 95
    """Quality of images that are re-encoded, 1 to 100."""
    lossless: bool = False
    """True if images that are re-encoded become PNG instead of JPEG: for drawings."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Flags of build_shards.py that a source may read."""

    raw: Path | None
    """Folder with the files as their owner published them; None if --raw was not given."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Values of the flags that the source declares in its FLAGS, where they were given."""
