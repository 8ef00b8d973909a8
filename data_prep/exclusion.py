"""Recognises images that a corpus must not hold, such as those of an evaluation split, by id and by perceptual hash."""

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
"""Fields of a sample that name its image in another data set, and the prefix of that data set's image ids.

Flickr30K's files are named by the number of the photograph on Flickr, which Visual Genome lists as well.
"""
_MIN_DETAIL_BITS = 20
"""Perceptual hashes with fewer bits set, or fewer unset, belong to plain images, which all look alike."""

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Exclusion:
    """Images to drop; takes 16 bytes of memory per image."""

    ids: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    """64-bit hashes of the image ids, sorted."""
    hashes: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    """Perceptual hashes, sorted."""
    distance: int = 0
    """Largest number of different bits of 64 with which two images count as the same."""
    digest: str = ""
    """SHA-256 of the content; empty if nothing is excluded."""

    def has_id(self, image_id: str, meta: Mapping[str, Any]) -> bool:
        """Return true if one of the image's ids is excluded."""
        if not len(self.ids):
            return False
        hashes = np.array([hash64(name) for name in list_image_names(image_id, meta)], np.uint64)
        indices = np.searchsorted(self.ids, hashes)
        return bool((self.ids[np.minimum(indices, len(self.ids) - 1)] == hashes).any())

    def has_hash(self, phash: int) -> bool:
        """Return true if an excluded image has nearly this perceptual hash."""
        if not len(self.hashes) or not is_distinctive(phash):
            return False
        return bool((np.bitwise_count(self.hashes ^ np.uint64(phash)) <= self.distance).any())


def list_image_names(image_id: str, meta: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ids of an image in all data sets that are known to hold it."""
    if image_id:
        yield image_id
    for name, prefix in _OTHER_IDS.items():
        if meta.get(name) is not None:
            yield f"{prefix}:{meta[name]}"


def is_distinctive(phash: int) -> bool:
    """Return false for the hash of a plain image, which many different images share."""
    return _MIN_DETAIL_BITS <= phash.bit_count() <= 64 - _MIN_DETAIL_BITS


def load_exclusion(manifests: Sequence[str], distance: int) -> Exclusion:
    """Collect the images of corpora.

    Args:
        manifests: folders of the corpora, or the shards.json in them.
        distance: largest number of different bits of 64 with which two images count as the same.

    Raises:
        DataError: a corpus does not exist, or was built without perceptual hashes.
    """
    ids: list[int] = []
    hashes: list[int] = []
    for name in manifests:
        path = to_path(name)
        folder = path.parent if path.name == MANIFEST_NAME else path
        for record in _read_records(folder):
            try:
                phash = int(record["phash"], 16)
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"--exclude={name}: its samples have no perceptual hash ({record.get('phash')!r}). Build these "
                    "shards again with this version."
                ) from None
            ids += [hash64(image_name) for image_name in list_image_names(record["image_id"], record)]
            if is_distinctive(phash):
                hashes.append(phash)
    if not manifests:
        return Exclusion()
    sorted_ids, sorted_hashes = (np.unique(np.array(values, np.uint64)) for values in (ids, hashes))
    content = f"{distance} {len(sorted_ids)} ".encode() + sorted_ids.tobytes() + sorted_hashes.tobytes()
    return Exclusion(sorted_ids, sorted_hashes, distance, hashlib.sha256(content).hexdigest())


def _read_records(folder: Path) -> Iterator[dict[str, Any]]:
    for shard in load_manifest(folder).shards:
        for row in load_index(folder / shard.name):
            yield read_row(folder / shard.name, row).record
