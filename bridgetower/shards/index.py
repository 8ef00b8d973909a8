"""The row index of a shard: where each sample lies in the tar, so that any sample is one read. Never imports torch."""

from __future__ import annotations

import bisect
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower.errors import DataError
from bridgetower.io.storage import EndOfFile, read_part, read_whole, reading
from bridgetower.rng import hash64
from bridgetower.shards.sample import IMAGE_SUFFIXES, SECOND_IMAGE_FIELD, SECOND_IMAGE_PREFIX, parse_record

INDEX_SUFFIX = ".index.npy"

INDEX_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),  # byte in the tar where the image starts
        ("image_bytes", "<u4"),
        ("record_offset", "<i4"),  # where the json member starts, counted from image_offset
        ("record_bytes", "<u4"),
        ("image_id", "<u8"),  # 64-bit hash of the record's image_id
        ("num_captions", "<u2"),
        ("first_pair", "<u4"),  # captions of all samples before it, so that a pair is found without a table in memory
    ]
)
"""34 bytes a sample: 4 million images take 136 MB, memory-mapped and so shared by all ranks and workers of a node."""

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
        for key, members in samples_of_tar(shard, name):
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
            rows.append(index_row(image, record, content))
            _check_second_image(members, image, record, content, where)
    return make_index(rows)


class IndexRow(NamedTuple):
    """What one sample alone knows of its row of the index."""

    image_offset: int
    image_bytes: int
    record_offset: int
    record_bytes: int
    image_id: int
    num_captions: int


def make_index(rows: Sequence[IndexRow]) -> Index:
    """The index of a shard from the rows of its samples."""
    ends = np.cumsum([row.num_captions for row in rows], dtype=np.int64)
    return np.array([(*row, end - row.num_captions) for row, end in zip(rows, ends, strict=True)], INDEX_DTYPE)


def index_row(image: tarfile.TarInfo, record: tarfile.TarInfo, content: Mapping[str, Any]) -> IndexRow:
    """The row of a sample, from its members and what parse_record gives."""
    return IndexRow(
        image.offset_data,
        image.size,
        record.offset_data - image.offset_data,
        record.size,
        hash64(content["image_id"]),
        len(content["captions"]),
    )


def index_bytes(index: Index) -> bytes:
    """The file of a row index."""
    stream = io.BytesIO()
    np.save(stream, index)
    return stream.getvalue()


def _check_second_image(
    members: dict[str, tarfile.TarInfo],
    image: tarfile.TarInfo,
    record: tarfile.TarInfo,
    content: dict[str, Any],
    where: str,
) -> None:
    """The row index says nothing of a second image, so it has to lie where second_image_offset computes it."""
    second = [member for suffix, member in members.items() if suffix.startswith(SECOND_IMAGE_PREFIX)]
    expected = content.get(SECOND_IMAGE_FIELD)
    if not second and expected is None:
        return
    after = max(image.offset_data + image.size, record.offset_data + record.size)
    if len(second) != 1 or second[0].size != expected or second[0].offset_data != second_image_offset(after):
        raise DataError(
            f"{where} has the members {sorted(members)} and {SECOND_IMAGE_FIELD}={expected!r}: its second image has to "
            "follow image and json at once. Build the shard with data_prep/build_shards.py."
        )


def second_image_offset(end: int) -> int:
    """Where the content of a tar member starts that follows a member whose content ends at byte ``end``."""
    blocks = -(-end // tarfile.BLOCKSIZE) + 1  # padding, and a header of one block
    return blocks * tarfile.BLOCKSIZE


def load_index(shard: Path) -> Index:
    """The whole row index of a shard, local or remote.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    sidecar = index_path(shard)
    cure = "Run data_prep/check_shards.py --repair on the folder, or build the shards again."
    try:
        with reading(sidecar):
            index: Index = np.load(io.BytesIO(read_whole(sidecar)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"The row index {sidecar} is damaged ({error}). {cure}") from error
    if index.dtype != INDEX_DTYPE:
        raise DataError(
            f"The row index {sidecar} has the fields {index.dtype.names}; this version reads {INDEX_DTYPE.names}. "
            f"{cure}"
        )
    return index


def samples_of_tar(shard: Path, name: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group the members of a tar as webdataset does: the key ends at the first dot of the file name.

    Files without a key or without a dot are passed over, as there.

    Args:
        name: what errors call the shard.

    Raises:
        DataError: the tar is damaged, or a key or a member is there twice.
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
    second_image: bytes = b""
    """NLVR2's right picture."""


def read_row(shard: Path, row: np.void) -> RawSample:
    """Read one sample of a shard, local or remote, by its row of the index.

    Raises:
        DataError: the shard is shorter than its index says, the record is damaged, or the index is another's.
    """

    def read(offset: int, num_bytes: int) -> bytes:
        try:
            with reading(shard):
                return read_part(shard, offset, num_bytes)
        except EndOfFile:
            return b""

    return _read_row(shard, row, f"at byte {int(row['image_offset'])}", read)


def _read_row(shard: Path, row: np.void, sample: str, read: Callable[[int, int], bytes]) -> RawSample:
    # All fields at once, as Python's numbers: one by one they cost as much as the read.
    image_start, image_bytes, record_offset, record_bytes, image_id, num_captions, _ = row.item()
    record_start = image_start + record_offset
    start = min(image_start, record_start)
    image_end = image_start + image_bytes
    record_end = record_start + record_bytes
    end = max(image_end, record_end)
    block = _read_whole(shard, sample, start, end - start, read)
    record = parse_record(block[record_start - start : record_end - start], f"{shard}:{sample}")
    if len(record["captions"]) != num_captions or hash64(record["image_id"]) != image_id:
        raise DataError(
            f"Sample {sample} of {shard} is not the one that its row index {index_path(shard).name} describes: shard "
            "and index are of different builds. Copy both again, or delete them and run the build_shards.py command "
            "again."
        )
    second = b""
    if record.get(SECOND_IMAGE_FIELD):
        second = _read_whole(shard, sample, second_image_offset(end), record[SECOND_IMAGE_FIELD], read)
    return RawSample(block[image_start - start : image_end - start], record, image_id, second)


def _read_whole(shard: Path, sample: str, offset: int, num_bytes: int, read: Callable[[int, int], bytes]) -> bytes:
    block = read(offset, num_bytes)
    if len(block) != num_bytes:
        raise DataError(
            f"{shard} ends before byte {offset + num_bytes:,}, to which sample {sample} reaches: the file was cut "
            "short. Copy or build it again."
        )
    return block


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
            # As a plain array, whose elements cost less; it keeps the map open.
            self._index: Index = np.lib.format.open_memmap(sidecar, mode="r").view(np.ndarray)
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
        return int(self._index[-1]["first_pair"]) + int(self._index[-1]["num_captions"]) if len(self._index) else 0

    def locate(self, pair: int) -> tuple[int, int]:
        """Sample number and caption number of a pair of this shard."""
        first_pair = self._index["first_pair"]
        # NumPy's search would first copy the column: as long as ten thousand samples.
        sample = bisect.bisect_right(first_pair, pair) - 1
        return sample, pair - int(first_pair[sample])

    def image_ids(self) -> npt.NDArray[np.uint64]:
        """The image id (64-bit hash) of every sample."""
        return np.asarray(self._index["image_id"])

    def captions_per_sample(self) -> npt.NDArray[np.int64]:
        """How many captions every sample has."""
        return self._index["num_captions"].astype(np.int64)

    def read(self, sample: int) -> RawSample:
        """Read one sample, with one system call (two where it has a second image).

        Raises:
            DataError: the shard is shorter than its index says, the record is damaged, or the index is another's.
        """
        with reading(self.shard):
            return _read_row(self.shard, self._index[sample], str(sample), self._pread)

    def key(self, sample: int) -> str:
        """The name of a sample in its tar, which the index does not hold.

        Raises:
            DataError: the shard cannot be read.
        """
        header = self._pread(int(self._index[sample]["image_offset"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.TarError as error:
            raise DataError(f"{self.shard} has no header before sample {sample} ({error}). Build it again.") from error
        if len(name) >= tarfile.LENGTH_NAME:  # cut off; the whole one stands in a member before it
            keys = [key for key, _ in samples_of_tar(self.shard, str(self.shard))]
            return keys[sample]
        folder, _, base = name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    def _pread(self, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._file, num_bytes, offset)

    def close(self) -> None:
        """Give the file back; the reader is of no use afterwards."""
        os.close(self._file)
