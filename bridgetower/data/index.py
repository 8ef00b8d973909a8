"""The row index of a shard: where each sample lies in the tar, so that any sample is one read. Never imports torch."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bridgetower.data.sample import IMAGE_SUFFIXES, parse_record
from bridgetower.draws import hash64
from bridgetower.errors import DataError

INDEX_SUFFIX = ".index.npy"

INDEX_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),  # byte in the tar where the image starts
        ("image_bytes", "<u4"),
        ("record_offset", "<i4"),  # where the json member starts, counted from image_offset
        ("record_bytes", "<u4"),
        ("image_id", "<u8"),  # 64-bit hash of the record's image_id
        ("num_captions", "<u2"),
    ]
)
"""30 bytes a sample: 4 million images take 120 MB, memory-mapped and so shared by all ranks and workers of a node."""

Index = npt.NDArray[np.void]


def index_path(shard: Path) -> Path:
    """The sidecar of a shard: ``00000.tar`` -> ``00000.index.npy``."""
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_SUFFIX)


def scan_tar(shard: Path, name: str | None = None) -> Index:
    """Make the row index of any webdataset tar whose samples have an image and a ``json`` with captions.

    Args:
        name: what errors call the shard, where it is read under a temporary name.

    Raises:
        DataError: the tar is damaged, or a sample lacks its image or captions.
    """
    rows = []
    name = name or shard.name
    with shard.open("rb") as file:
        for key, members in _samples(shard, name):
            where = f"{name}:{key}"
            images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
            if len(images) != 1 or "json" not in members:
                raise DataError(
                    f"{where} has the members {sorted(members)}; it needs one image ({', '.join(IMAGE_SUFFIXES)}) "
                    "and one json with its captions."
                )
            image, record = members[images[0]], members["json"]
            file.seek(record.offset_data)
            content = parse_record(file.read(record.size), where)
            rows.append(
                (
                    image.offset_data,
                    image.size,
                    record.offset_data - image.offset_data,
                    record.size,
                    hash64(content["image_id"]),
                    len(content["captions"]),
                )
            )
    return np.array(rows, INDEX_DTYPE)


def _samples(shard: Path, name: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group the members of a tar as webdataset does: the key ends at the first dot of the file name.

    Files without a key or without a dot are passed over, as there.
    """
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    if current is not None:
                        yield current, members
                    if key in seen:
                        raise DataError(f"{name} holds the key {key!r} twice; keys must be unique and stand together.")
                    seen.add(key)
                    current, members = key, {}
                if suffix.lower() in members:
                    raise DataError(f"{name} holds {key}.{suffix.lower()} twice; build it again with each file once.")
                members[suffix.lower()] = member
            _check_end(tar)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{name} is not a readable tar file ({error}). Delete it and build it again.") from error
    if current is not None:
        yield current, members


def _check_end(tar: tarfile.TarFile) -> None:
    """Stop where tarfile would not: it takes a damaged header in the middle for the end of the file."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard, not decoded."""

    image: bytes
    record: dict[str, Any]
    image_id: int
    """64-bit hash of the record's image_id."""


class ShardReader:
    """Reads samples of one shard in any order, one ``pread`` each. Safe to use after a fork."""

    def __init__(self, shard: Path) -> None:
        """Open a shard and its row index.

        Raises:
            DataError: the shard or its index is missing, or the index is damaged or of another version.
        """
        self.shard = shard
        sidecar = index_path(shard)
        try:
            self._index: Index = np.lib.format.open_memmap(sidecar, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"The row index {sidecar} cannot be read ({error}). Run the command that built the shards again: "
                "it keeps what is there and makes what is missing."
            ) from error
        if self._index.dtype != INDEX_DTYPE:
            raise DataError(
                f"The row index {sidecar} has the fields {self._index.dtype.names}, this version reads "
                f"{INDEX_DTYPE.names}. Build the shards again with this version."
            )
        self._first_pair = np.concatenate([[0], np.cumsum(self._index["num_captions"], dtype=np.int64)])
        try:
            self._file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"The shard {shard} cannot be read ({error.strerror}). Copy or build it again.") from error

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._index)

    @property
    def num_pairs(self) -> int:
        """Number of captions of all samples."""
        return int(self._first_pair[-1])

    def locate(self, pairs: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sample number and caption number of each pair of this shard."""
        numbers = np.asarray(pairs, np.int64)
        samples = np.searchsorted(self._first_pair, numbers, side="right") - 1
        return samples, numbers - self._first_pair[samples]

    def image_ids(self) -> npt.NDArray[np.uint64]:
        """The image id (64-bit hash) of every sample."""
        return np.asarray(self._index["image_id"])

    def captions_per_sample(self) -> npt.NDArray[np.int64]:
        """How many captions every sample has."""
        return self._index["num_captions"].astype(np.int64)

    def read(self, sample: int) -> RawSample:
        """Read one sample, with one system call.

        Raises:
            DataError: the shard is shorter than its index says, the record is damaged, or the index is another's.
        """
        row = self._index[sample]
        image_start = int(row["image_offset"])
        record_start = image_start + int(row["record_offset"])
        start = min(image_start, record_start)
        image_end = image_start + int(row["image_bytes"])
        record_end = record_start + int(row["record_bytes"])
        num_bytes = max(image_end, record_end) - start
        block = os.pread(self._file, num_bytes, start)
        if len(block) != num_bytes:
            raise DataError(
                f"{self.shard} ends at byte {os.fstat(self._file).st_size}, but sample {sample} reaches to byte "
                f"{start + num_bytes}: the file was cut short. Copy or build it again."
            )
        record = parse_record(block[record_start - start : record_end - start], f"{self.shard}:{sample}")
        image_id = int(row["image_id"])
        if len(record["captions"]) != row["num_captions"] or hash64(record["image_id"]) != image_id:
            raise DataError(
                f"Sample {sample} of {self.shard} is not the one that its row index {index_path(self.shard).name} "
                "describes: shard and index are of different builds. Copy both again, or delete them and run the "
                "build_shards.py command again."
            )
        return RawSample(block[image_start - start : image_end - start], record, image_id)

    def close(self) -> None:
        """Give the file back; the reader is of no use afterwards."""
        os.close(self._file)
