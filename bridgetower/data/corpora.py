"""The opened corpora of a run: their manifests, and one reader for the pairs of all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower.data.index import ShardReader
from bridgetower.data.manifest import Manifest, load_manifest
from bridgetower.data.order import Located
from bridgetower.errors import DataError

_MAX_OPEN_SHARDS = 256


class Pair(NamedTuple):
    """One image with one caption, as it lies in the shard."""

    where: str
    """Shard and key or number, for errors and traces."""
    image: bytes
    image_id: int
    corpus: int
    caption: str
    record: dict[str, Any]


class Corpora:
    """Corpus folders read as one list of shards."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Check the manifests and that every shard is there.

        Raises:
            DataError: a folder, manifest, shard or index is missing or of the wrong size, or a corpus is empty or
                given twice.
        """
        self.folders = tuple(Path(folder) for folder in folders)
        self.manifests: tuple[Manifest, ...] = tuple(load_manifest(folder) for folder in self.folders)
        seen: dict[str, Path] = {}
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if not manifest.num_pairs:
                raise DataError(
                    f"{folder} holds no pairs (rejected: {manifest.totals.rejects or 'none'}). Leave it out, or see "
                    "why its source gave none."
                )
            first = seen.setdefault(manifest.digest(), folder)
            if first is not folder:
                raise DataError(f"{first} and {folder} hold the same pairs, which would be read twice. Leave one out.")
        shards = [
            (folder / shard.name, shard.pairs, corpus)
            for corpus, (folder, manifest) in enumerate(zip(self.folders, self.manifests, strict=True))
            for shard in manifest.shards
            if shard.pairs
        ]
        self.shard_paths = [path for path, _, _ in shards]
        self.pairs_per_shard = [pairs for _, pairs, _ in shards]
        self.corpus_of_shard = [corpus for _, _, corpus in shards]
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        """A worker process opens the shards it reads by itself."""
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def names(self) -> list[str]:
        """A short name for each corpus, as given to people."""
        return [folder.name for folder in self.folders]

    def reader(self, shard: int) -> ShardReader:
        """The reader of one shard; the ones used last stay open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        reader = ShardReader(self.shard_paths[shard])
        if reader.num_pairs != self.pairs_per_shard[shard]:
            raise DataError(
                f"The row index of {self.shard_paths[shard]} counts {reader.num_pairs} pairs, the manifest "
                f"{self.pairs_per_shard[shard]}: they are of different builds. Build or copy the folder again."
            )
        self._open[shard] = reader
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return reader

    def read(self, located: Located) -> list[Pair]:
        """Read pairs, in the order asked for."""
        pairs: list[Pair] = []
        for shard, number in zip(located.shard.tolist(), located.pair.tolist(), strict=True):
            reader = self.reader(shard)
            samples, captions = reader.locate([number])
            raw = reader.read(int(samples[0]))
            pairs.append(
                Pair(
                    where=f"{self.shard_paths[shard]}, sample {int(samples[0])} (image_id {raw.record['image_id']})",
                    image=raw.image,
                    image_id=raw.image_id,
                    corpus=self.corpus_of_shard[shard],
                    caption=raw.record["captions"][int(captions[0])],
                    record=raw.record,
                )
            )
        return pairs


def as_int64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The same 64 bits as a signed number, which torch can hold: equal stays equal."""
    return values.view(np.int64)
