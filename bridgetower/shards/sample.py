"""One sample of a shard: key, image, captions, and what the source knows about them. Never imports torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridgetower.errors import DataError
from bridgetower.rng import hash64

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MAX_KEY_LENGTH = 80  # key and suffix must fit into the 100 bytes that a plain tar header has for a name
SECOND_IMAGE_PREFIX = "right."
SECOND_IMAGE_FIELD = "second_image_bytes"
_OTHER_ID_FIELDS = ("sha256", "uid", "url")
_RESERVED_FIELDS = ("image_id", "source", "captions", "width", "height", "phash", "annotations", SECOND_IMAGE_FIELD)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with all its captions, as a shard stores it."""

    key: str
    """Common name of its tar members, unique in the corpus: letters, digits, ``_`` and ``-`` (a dot ends the key)."""
    image: bytes
    image_suffix: str
    image_id: str
    """Name of the image itself, not of its file: pairs with the same id are never each other's negatives."""
    source: str
    captions: tuple[str, ...]
    width_px: int
    height_px: int
    phash: int
    """64-bit perceptual hash, most bits of which near duplicates share (data_prep.convert.perceptual_hash)."""
    annotations: tuple[Mapping[str, Any], ...] = ()
    """Answers, labels or ids of each caption, in the captions' order; or empty."""
    second_image: bytes = b""
    """NLVR2's right image."""
    second_image_suffix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the source knows: ``url``, ``coco_id``."""

    def members(self) -> dict[str, bytes]:
        """Return the content of each tar member, by suffix.

        The members are the image, ``txt`` with the first caption, and ``json`` with everything else. A second image
        gets the suffix ``right.jpg``, so that readers which expect one image find the first.
        """
        record = {
            "image_id": self.image_id,
            "source": self.source,
            "captions": list(self.captions),
            "width": self.width_px,
            "height": self.height_px,
            "phash": f"{self.phash:016x}",
            **({"annotations": [dict(annotation) for annotation in self.annotations]} if self.annotations else {}),
            **({SECOND_IMAGE_FIELD: len(self.second_image)} if self.second_image else {}),
            **{name: value for name, value in self.meta.items() if name not in _RESERVED_FIELDS},
        }
        members = {
            self.image_suffix: self.image,
            "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
            "txt": self.captions[0].encode(),
        }
        if self.second_image:
            members[f"{SECOND_IMAGE_PREFIX}{self.second_image_suffix}"] = self.second_image
        return dict(sorted(members.items()))


def safe_key(name: str) -> str:
    """Turn a file name into a tar key: the name itself if it is valid, else its valid characters and a hash."""
    if _KEY.fullmatch(name) and len(name) <= _MAX_KEY_LENGTH:
        return name
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:60]
    return f"{readable}-{hash64(name):016x}"


def clean_caption(caption: str) -> str:
    """Normalise a caption to NFC and collapse white space.

    A lone surrogate, which scraped JSON has where a text was cut inside an emoji, becomes U+FFFD. Nothing else is
    changed: the paper feeds raw captions (no lower-casing, no prompt).
    """
    valid = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(unicodedata.normalize("NFC", valid).split())


def parse_record(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the ``json`` member of a sample, and check the fields that every reader relies on.

    Samples of img2dataset, LAION and DataComp have a ``caption`` and no ``image_id``. They get ``captions``, and an
    ``image_id`` made of the image's checksum, the ``uid`` or the URL.

    Args:
        where: name of the sample in errors, as ``shard.tar:key``.

    Returns: the record, with non-empty ``captions`` and a text as ``image_id``.

    Raises:
        DataError: the member is not a JSON object, or lacks captions or image_id.
    """
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where}.json is not JSON ({error}). Rebuild the shard.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}.json holds a {type(record).__name__}, not an object. Rebuild the shard.")
    if "captions" not in record and isinstance(record.get("caption"), str):
        record["captions"] = [caption for caption in (clean_caption(record["caption"]),) if caption]
    if "image_id" not in record:
        ids = [f"{field}:{record[field]}" for field in _OTHER_ID_FIELDS if isinstance(record.get(field), str)]
        record["image_id"] = ids[0] if ids else None
    captions = record.get("captions")
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(caption, str) and caption for caption in captions)
    ):
        raise DataError(
            f"{where}.json has captions={captions!r}; it needs a list of one or more non-empty texts. "
            "Build the shards with data_prep/build_shards.py."
        )
    if not isinstance(record.get("image_id"), str):
        raise DataError(
            f"{where}.json has image_id={record.get('image_id')!r}; it needs a text that names the image. "
            "Build the shards with data_prep/build_shards.py."
        )
    return record
