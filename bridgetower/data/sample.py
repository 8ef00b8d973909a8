"""What one sample of a shard holds: key, image, captions and what the source knows about them. Never imports torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridgetower.draws import hash64
from bridgetower.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MAX_KEY = 80  # with its suffix it has to fit into the 100 bytes of a plain tar header
_OWN_FIELDS = ("image_id", "source", "captions", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with all its captions, as it stands in a shard."""

    key: str
    """Name of its tar members, unique in the corpus: letters, digits, ``_`` and ``-`` (a dot would end the key)."""
    image: bytes
    image_suffix: str
    image_id: str
    """Names the picture itself: pairs with the same id are never each other's negatives."""
    source: str
    captions: tuple[str, ...]
    width_px: int
    height_px: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the source knows beside: ``url``, ``coco_id``, ``split``, questions and answers."""

    def members(self) -> dict[str, bytes]:
        """The tar members by suffix: the image, ``txt`` with the first caption, ``json`` with everything else."""
        record = {
            "image_id": self.image_id,
            "source": self.source,
            "captions": list(self.captions),
            "width": self.width_px,
            "height": self.height_px,
            **{name: value for name, value in self.meta.items() if name not in _OWN_FIELDS},
        }
        return {
            self.image_suffix: self.image,
            "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
            "txt": self.captions[0].encode(),
        }


def safe_key(name: str) -> str:
    """A tar key for any file name: the name itself where it can be one, otherwise its letters and a hash of it all."""
    if _KEY.fullmatch(name) and len(name) <= _MAX_KEY:
        return name
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:60]
    return f"{readable}-{hash64(name):016x}"


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Normalise to NFC, fold white space, drop empty captions and repeats; the order stays.

    Half a surrogate pair, which a cut through an emoji leaves in scraped JSON, is no text and becomes U+FFFD.
    Nothing else is touched: the paper feeds raw captions (no lower-casing, no prompt). The published code removes
    repeats through an unordered set, so that each process has its own order.
    """
    whole = (caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for caption in captions)
    folded = (" ".join(unicodedata.normalize("NFC", caption).split()) for caption in whole)
    return tuple(dict.fromkeys(caption for caption in folded if caption))


def parse_record(raw: bytes, where: str) -> dict[str, Any]:
    """Read the ``json`` member of a sample and check what every reader relies on.

    Args:
        where: names the sample in errors, as ``shard.tar:key``.

    Raises:
        DataError: it is not JSON, or has no list of non-empty captions.
    """
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where}.json is not JSON ({error}). Rebuild the shard.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}.json holds a {type(record).__name__}, not an object. Rebuild the shard.")
    captions = record.get("captions")
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(caption, str) and caption for caption in captions)
    ):
        raise DataError(
            f"{where}.json has captions={captions!r}; it needs a list of at least one text. "
            "Build the shards with data_prep/build_shards.py."
        )
    if not isinstance(record.get("image_id"), str):
        raise DataError(f"{where}.json has image_id={record.get('image_id')!r}; it needs a text that names the image.")
    return record
