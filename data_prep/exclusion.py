"""Images that a corpus must not hold, as they are in another one or in an evaluation split: by id and by their look."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bridgetower.errors import DataError
from bridgetower.io.storage import to_path
from bridgetower.rng import hash64
from bridgetower.shards.index import load_index, read_row
from bridgetower.shards.manifest import MANIFEST_NAME, load_manifest

_OTHER_IDS = {"coco_id": "coco", "flickr_id": "flickr30k"}
"""Fields of a sample that name its picture in another data set, and how image ids of that one begin.

The files of Flickr30K are named by the number that the photograph has on Flickr, which Visual Genome lists.
"""
_MIN_DETAIL_BITS = 20
"""Perceptual hashes with fewer bits set or unset are those of plain pictures, which all look alike."""

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Exclusion:
    """What to drop; 16 bytes an image."""

    ids: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of the ids, sorted."""
    hashes: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    """Perceptual hashes, sorted."""
    distance: int = 0
    """Pictures count as the same up to this many different bits of 64."""
    digest: str = ""
    """Changes with the content."""

    def has_id(self, image_id: str, meta: Mapping[str, Any]) -> bool:
        """True if one of the names of the image is excluded."""
        if not len(self.ids):
            return False
        names = np.array([hash64(name) for name in image_names(image_id, meta)], np.uint64)
        at = np.searchsorted(self.ids, names)
        return bool((self.ids[np.minimum(at, len(self.ids) - 1)] == names).any())

    def has_hash(self, phash: int) -> bool:
        """True if an excluded image looks like it."""
        if not len(self.hashes) or not is_telling(phash):
            return False
        return bool((np.bitwise_count(self.hashes ^ np.uint64(phash)) <= self.distance).any())


def image_names(image_id: str, meta: Mapping[str, Any]) -> Iterator[str]:
    """All names that an image has in the data sets that it is in."""
    if image_id:
        yield image_id
    for name, prefix in _OTHER_IDS.items():
        if meta.get(name) is not None:
            yield f"{prefix}:{meta[name]}"


def is_telling(phash: int) -> bool:
    """False for the hash of a plain picture, which says nothing about it."""
    return _MIN_DETAIL_BITS <= phash.bit_count() <= 64 - _MIN_DETAIL_BITS


def load_exclusion(manifests: Sequence[str], distance: int) -> Exclusion:
    """Collect the images of corpora.

    Args:
        manifests: their folders, or the shards.json in them.
        distance: up to how many different bits of 64 two pictures count as the same.

    Raises:
        DataError: a corpus is not there, or was built without perceptual hashes.
    """
    ids: list[int] = []
    hashes: list[int] = []
    for name in manifests:
        path = to_path(name)
        folder = path.parent if path.name == MANIFEST_NAME else path
        for record in _records(folder):
            try:
                phash = int(record["phash"], 16)
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"--exclude={name}: its samples have no perceptual hash ({record.get('phash')!r}). Build these "
                    "shards again with this version."
                ) from None
            ids += [hash64(one) for one in image_names(record["image_id"], record)]
            if is_telling(phash):
                hashes.append(phash)
    if not manifests:
        return Exclusion()
    found = [np.unique(np.array(values, np.uint64)) for values in (ids, hashes)]
    digest = hashlib.sha256(f"{distance} {len(found[0])} ".encode() + b"".join(one.tobytes() for one in found))
    return Exclusion(found[0], found[1], distance, digest.hexdigest())


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for shard in load_manifest(folder).shards:
        for row in load_index(folder / shard.name):
            yield read_row(folder / shard.name, row).record
