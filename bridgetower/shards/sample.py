"""What one sample of a shard holds: key, image, captions and what the source knows about them. Never imports torch."""

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
_MAX_KEY = 80  # with its suffix it has to fit into the 100 bytes of a plain tar header
SECOND_IMAGE_PREFIX = "right."
SECOND_IMAGE_FIELD = "second_image_bytes"
_OTHER_NAMES = ("sha256", "uid", "url")
_OWN_FIELDS = ("image_id", "source", "captions", "width", "height", "phash", "annotations", SECOND_IMAGE_FIELD)


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
    phash: int
    """64 bits that copies of the picture mostly share (data_prep.convert.perceptual_hash)."""
    annotations: tuple[Mapping[str, Any], ...] = ()
    """What belongs to each caption, or nothing: answers, labels, ids."""
    second_image: bytes = b""
    """NLVR2's right picture."""
    second_image_suffix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the source knows beside: ``url``, ``coco_id``."""

    def members(self) -> dict[str, bytes]:
        """The tar members by suffix: the image, ``txt`` with the first caption, ``json`` with everything else.

        A second image gets the suffix ``right.jpg``, so that readers which know of one image find the first.
        """
        record = {
            "image_id": self.image_id,
            "source": self.source,
            "captions": list(self.captions),
            "width": self.width_px,
            "height": self.height_px,
            "phash": f"{self.phash:016x}",
            **({"annotations": [dict(one) for one in self.annotations]} if self.annotations else {}),
            **({SECOND_IMAGE_FIELD: len(self.second_image)} if self.second_image else {}),
            **{name: value for name, value in self.meta.items() if name not in _OWN_FIELDS},
        }
        found = {
            self.image_suffix: self.image,
            "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
            "txt": self.captions[0].encode(),
        }
        if self.second_image:
            found[f"{SECOND_IMAGE_PREFIX}{self.second_image_suffix}"] = self.second_image
        return dict(sorted(found.items()))


def safe_key(name: str) -> str:
    """A tar key for any file name: the name itself where it can be one, otherwise its letters and a hash of it all."""
    if _KEY.fullmatch(name) and len(name) <= _MAX_KEY:
        return name
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:60]
    return f"{readable}-{hash64(name):016x}"


def clean_caption(caption: str) -> str:
    """Normalise to NFC and fold white space.

    Half a surrogate pair, which a cut through an emoji leaves in scraped JSON, is no text and becomes U+FFFD.
    Nothing else is touched: the paper feeds raw captions (no lower-casing, no prompt).
    """
    whole = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(unicodedata.normalize("NFC", whole).split())


def parse_record(raw: bytes, where: str) -> dict[str, Any]:
    """Read the ``json`` member of a sample and check what every reader relies on.

    Samples of img2dataset, LAION and DataComp have a ``caption`` and no ``image_id``: they get ``captions`` and a name
    of the picture from its checksum, their ``uid`` or its address.

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
    if "captions" not in record and isinstance(record.get("caption"), str):
        record["captions"] = [caption for caption in [clean_caption(record["caption"])] if caption]
    if "image_id" not in record:
        names = [f"{field}:{record[field]}" for field in _OTHER_NAMES if isinstance(record.get(field), str)]
        record["image_id"] = names[0] if names else None
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
