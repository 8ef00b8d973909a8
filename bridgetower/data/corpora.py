"""The corpora of a run, opened: their manifests, and one reader for the pairs of all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower.config.data import DataConfig, ReadingConfig
from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import shorten_paths
from bridgetower.io.storage import is_remote, to_path
from bridgetower.shards.cache import HeldShard, ShardCache
from bridgetower.shards.download import NotFetched, RemoteShard
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import Manifest, load_manifest

_MAX_OPEN_SHARDS = 256
# An open shard cannot be evicted from the cache.
_MAX_OPEN_REMOTE_SHARDS = 4


class Pair(NamedTuple):
    """One image with one caption, as the shard stores it: not decoded."""

    where: str
    """Shard, sample and image id, for errors."""
    shard: int
    """Number of the shard, counted over all corpora."""
    sample: int
    """Number of the sample in the shard."""
    image: bytes
    image_id: int
    """64-bit hash of the record's image_id."""
    corpus: int
    """Number of the corpus, in the order of the folders."""
    caption: str
    record: dict[str, Any]
    annotation: dict[str, Any]
    """Answers, labels or ids of the caption; or empty."""
    second_image: bytes
    """NLVR2's right image; or empty."""


class _Open(NamedTuple):
    reader: ShardReader
    held: HeldShard | None

    def close(self) -> None:
        self.reader.close()
        if self.held is not None:
            self.held.release()


class Corpora:
    """Corpus folders, read as one list of shards."""

    def __init__(self, folders: Sequence[str | Path], cache: ShardCache | None = None) -> None:
        """Read the manifests and check that every shard exists (on a web server: when it is read).

        Args:
            cache: folder for shards of remote folders.

        Raises:
            ConfigError: a folder is remote, and there is no cache.
            DataError: a folder, manifest, shard or index is missing or has the wrong size, or a corpus is empty or
                given twice.
        """
        self.folders = tuple(to_path(folder) for folder in folders)
        self.cache = cache
        for folder in self.folders:
            if is_remote(folder) and cache is None:
                raise ConfigError(
                    f"{folder} is remote: give --data.cache_dir=DIR, a folder on a local disk that keeps its shards "
                    "while they are read, and --data.cache_gb, the maximum size of that folder."
                )
        self.manifests: tuple[Manifest, ...] = tuple(load_manifest(folder) for folder in self.folders)
        seen: dict[str, Path] = {}
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if not manifest.num_pairs:
                raise DataError(
                    f"{folder} holds no pairs (rejected: {manifest.totals.rejects or 'none'}). Leave it out, or check "
                    "why its source produced none."
                )
            first = seen.setdefault(manifest.digest(), folder)
            if first is not folder:
                raise DataError(f"{first} and {folder} hold the same pairs, which would be read twice. Leave one out.")
        shards = [
            (folder / shard.name, shard, corpus)
            for corpus, (folder, manifest) in enumerate(zip(self.folders, self.manifests, strict=True))
            for shard in manifest.shards
            if shard.pairs
        ]
        self.shard_paths = [path for path, _, _ in shards]
        self.pairs_per_shard = [shard.pairs for _, shard, _ in shards]
        self.corpus_of_shard = [corpus for _, _, corpus in shards]
        self.remote = [RemoteShard(url=path, entry=shard) if is_remote(path) else None for path, shard, _ in shards]
        """Each shard's URL and manifest entry, or None if it is local."""
        self._pair_end = np.cumsum(self.pairs_per_shard)
        self._shard_end = np.cumsum([sum(bool(shard.pairs) for shard in m.shards) for m in self.manifests])
        self.is_remote = any(shard is not None for shard in self.remote)
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._needed: frozenset[int] = frozenset()
        # Errors of shards that could not be fetched. Trying again for each of their pairs would take minutes each time.
        self._failed: dict[int, str] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave open shards behind: a worker process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def names(self) -> list[str]:
        """A short name for each corpus: the shortest suffix of its path that distinguishes it."""
        return shorten_paths(self.folders)

    def reader(self, shard: int) -> ShardReader:
        """Return the reader of one shard. The most recently used shards stay open.

        Raises:
            NotFetched: the shard is remote, and its store does not deliver it.
            DataError: the shard or its index cannot be read, or they come from different builds.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard].reader
        path, held, remote = self.shard_paths[shard], None, self.remote[shard]
        if remote is not None:
            assert self.cache is not None
            if shard in self._failed:
                raise NotFetched(self._failed[shard])
            try:
                held = self.cache.hold(remote)
            except NotFetched as error:
                self._failed[shard] = str(error)
                raise
            path = held.path
        reader = ShardReader(path)
        if reader.num_pairs != self.pairs_per_shard[shard]:
            raise DataError(
                f"The row index of {self.shard_paths[shard]} counts {reader.num_pairs} pairs, the manifest "
                f"{self.pairs_per_shard[shard]}: they come from different builds. Build or copy the folder again."
            )
        self._open[shard] = _Open(reader, held)
        self._close_oldest()
        return reader

    def keep_open(self, shards: Collection[int]) -> None:
        """Keep these shards open once they are, until the next call. Others are closed when too many are open.

        A shard that could not be fetched is tried again when a later call names it anew.
        """
        self._needed = frozenset(shards)
        self._failed = {shard: reason for shard, reason in self._failed.items() if shard in self._needed}
        self._close_oldest()

    def _close_oldest(self) -> None:
        max_others = _MAX_OPEN_SHARDS
        if self.is_remote:
            max_others = 1 if self._needed else _MAX_OPEN_REMOTE_SHARDS
        others = [shard for shard in self._open if shard not in self._needed]
        for shard in others[: max(0, len(others) - max_others)]:
            self._open.pop(shard).close()

    def read(self, shard: int, number: int) -> Pair:
        """Read one pair.

        Args:
            shard: number of the shard, counted over all corpora.
            number: number of the pair in the shard.

        Raises:
            DataError: the pair cannot be read, or is not what the index says.
        """
        reader = self.reader(shard)
        sample, caption = reader.locate(number)
        raw = reader.read(sample)
        annotations = raw.record.get("annotations")
        if not isinstance(annotations, list) or len(annotations) != len(raw.record["captions"]):
            annotations = []
        return Pair(
            where=f"{self.shard_paths[shard]}, sample {sample} (image_id {raw.record['image_id']})",
            shard=shard,
            sample=sample,
            image=raw.image,
            image_id=raw.image_id,
            corpus=self.corpus_of_shard[shard],
            caption=raw.record["captions"][caption],
            record=raw.record,
            annotation=annotations[caption] if annotations else {},
            second_image=raw.second_image,
        )

    def read_image_id(self, shard: int, number: int) -> int:
        """Read the image id (64-bit hash) of a pair from the index alone."""
        reader = self.reader(shard)
        sample, _ = reader.locate(number)
        return int(reader.image_ids()[sample])

    def pairs_of_corpus(self, corpus: int) -> int:
        """Return the number of pairs of a corpus."""
        return self.manifests[corpus].num_pairs

    def pair_of_corpus(self, corpus: int, number: int) -> tuple[int, int]:
        """Convert a pair's number in its corpus to a shard and the pair's number in that shard."""
        first_shard = int(self._shard_end[corpus - 1]) if corpus else 0
        number += int(self._pair_end[first_shard - 1]) if first_shard else 0
        shard = int(np.searchsorted(self._pair_end, number, side="right"))
        return shard, number - (int(self._pair_end[shard - 1]) if shard else 0)


def open_cache(config: ReadingConfig) -> ShardCache | None:
    """Open the cache of remote shards, or return None if the settings have no cache_dir."""
    return ShardCache(Path(config.cache_dir), round(config.cache_gb * 1e9)) if config.cache_dir else None


def open_corpora(folders: Sequence[str], config: ReadingConfig) -> Corpora:
    """Open corpus folders with the cache of the settings.

    Raises:
        ConfigError: a folder is remote, and there is no cache, or data.itm_negatives=corpus.
        DataError: a corpus does not match its manifest.
    """
    corpora = Corpora(folders, open_cache(config))
    if corpora.is_remote and isinstance(config, DataConfig) and config.itm_negatives == "corpus":
        raise ConfigError(
            "data.itm_negatives=corpus reads images from a whole corpus, so remote shards would be fetched repeatedly. "
            "Copy the shards to a file system first, or use --data.itm_negatives=group."
        )
    return corpora


def as_int64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Reinterpret 64 bits as a signed number, which torch supports. Equal ids stay equal."""
    return values.view(np.int64)
