"""The row index of a shard, which makes any sample of the tar one read. Never imports torch."""

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
from bridgetower.io.storage import EndOfFile, explain_read_errors, read_file, read_part
from bridgetower.rng import hash64
from bridgetower.shards.sample import IMAGE_SUFFIXES, SECOND_IMAGE_FIELD, SECOND_IMAGE_PREFIX, parse_record

INDEX_SUFFIX = ".index.npy"

INDEX_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),  # byte of the tar where the image starts
        ("image_bytes", "<u4"),
        ("record_offset", "<i4"),  # byte where the json member starts, relative to image_offset
        ("record_bytes", "<u4"),
        ("image_id", "<u8"),  # 64-bit hash of the record's image_id
        ("num_captions", "<u2"),
        ("first_pair", "<u4"),  # captions of all earlier samples, so that a pair is found by bisection
    ]
)
"""One row of the index, 34 bytes. The 4 million images of pretraining take 136 MB, which all ranks and workers of a
node share, as the file is memory-mapped."""

Index = npt.NDArray[np.void]


def index_path(shard: Path) -> Path:
    """Return the path of a shard's row index: ``00000.tar`` -> ``00000.index.npy``."""
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_SUFFIX)


def scan_tar(shard: Path, name: str | None = None) -> Index:
    """Build the row index of any webdataset tar whose samples have an image and a ``json`` with captions.

    Args:
        name: name of the shard in errors; by default its file name.

    Raises:
        DataError: the tar is damaged, or a sample lacks its image or captions.
    """
    rows = []
    name = name or shard.name
    with shard.open("rb") as file:
        for key, members in iterate_samples(shard, name):
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
            rows.append(make_index_row(image, record, content))
            _check_second_image(members, image, record, content, where)
    return make_index(rows)


class IndexRow(NamedTuple):
    """The fields of an index row that follow from the sample alone: all but ``first_pair``."""

    image_offset: int
    image_bytes: int
    record_offset: int
    record_bytes: int
    image_id: int
    num_captions: int


def make_index(rows: Sequence[IndexRow]) -> Index:
    """Join the rows of a shard's samples into its index."""
    pair_ends = np.cumsum([row.num_captions for row in rows], dtype=np.int64)
    return np.array([(*row, end - row.num_captions) for row, end in zip(rows, pair_ends, strict=True)], INDEX_DTYPE)


def make_index_row(image: tarfile.TarInfo, record: tarfile.TarInfo, content: Mapping[str, Any]) -> IndexRow:
    """Return the index row of a sample.

    Args:
        content: the record, as ``parse_record`` returns it.
    """
    return IndexRow(
        image.offset_data,
        image.size,
        record.offset_data - image.offset_data,
        record.size,
        hash64(content["image_id"]),
        len(content["captions"]),
    )


def encode_index(index: Index) -> bytes:
    """Return the content of the file of a row index."""
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
    """Check that a second image lies where ``second_image_offset`` computes it: the row index does not list it."""
    second = [member for suffix, member in members.items() if suffix.startswith(SECOND_IMAGE_PREFIX)]
    expected = content.get(SECOND_IMAGE_FIELD)
    if not second and expected is None:
        return
    after = max(image.offset_data + image.size, record.offset_data + record.size)
    if len(second) != 1 or second[0].size != expected or second[0].offset_data != second_image_offset(after):
        raise DataError(
            f"{where} has the members {sorted(members)} and {SECOND_IMAGE_FIELD}={expected!r}: its second image must "
            "follow image and json directly. Build the shard with data_prep/build_shards.py."
        )


def second_image_offset(end: int) -> int:
    """Return the byte where a tar member's content starts if the member before it ends at byte ``end``."""
    blocks = -(-end // tarfile.BLOCKSIZE) + 1  # the padding of the last block, and a header of one block
    return blocks * tarfile.BLOCKSIZE


def load_index(shard: Path) -> Index:
    """Read the whole row index of a shard, local or remote.

    Raises:
        DataError: the index is missing, damaged or of another version.
    """
    sidecar = index_path(shard)
    suggestion = "Run data_prep/check_shards.py --repair on the folder, or build the shards again."
    try:
        with explain_read_errors(sidecar):
            index: Index = np.load(io.BytesIO(read_file(sidecar)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"The row index {sidecar} is damaged ({error}). {suggestion}") from error
    if index.dtype != INDEX_DTYPE:
        raise DataError(
            f"The row index {sidecar} has the fields {index.dtype.names}; this version reads {INDEX_DTYPE.names}. "
            f"{suggestion}"
        )
    return index


def iterate_samples(shard: Path, name: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield each sample's key and its members by suffix, grouped as webdataset does.

    The key ends at the first dot of the file name. Files without a key or without a dot are skipped, as there.

    Args:
        name: name of the shard in errors.

    Raises:
        DataError: the tar is damaged, or a key or a member occurs twice.
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
                        raise DataError(
                            f"{name} holds the key {key!r} twice; keys must be unique and "
                            "their members adjacent. Build it again."
                        )
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
    """Raise ReadError for a damaged header in the middle of a tar, which tarfile takes for the end of the file."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


@dataclass(frozen=True)
class RawSample:
    """One sample as the shard stores it, its images not decoded."""

    image: bytes
    record: dict[str, Any]
    image_id: int
    """64-bit hash of the record's image_id."""
    second_image: bytes = b""
    """NLVR2's right image, or empty."""


def read_row(shard: Path, row: np.void) -> RawSample:
    """Read one sample of a shard, local or remote, by its index row.

    Raises:
        DataError: the shard is shorter than its index says, the record is damaged, or the index belongs to another
            shard.
    """

    def read(offset: int, num_bytes: int) -> bytes:
        try:
            with explain_read_errors(shard):
                return read_part(shard, offset, num_bytes)
        except EndOfFile:
            return b""

    return _read_row(shard, row, f"at byte {int(row['image_offset'])}", read)


def _read_row(shard: Path, row: np.void, sample: str, read: Callable[[int, int], bytes]) -> RawSample:
    # item() converts all fields to Python numbers at once. Converting them one by one costs as much as the read.
    image_start, image_bytes, record_offset, record_bytes, image_id, num_captions, _ = row.item()
    record_start = image_start + record_offset
    start = min(image_start, record_start)
    image_end = image_start + image_bytes
    record_end = record_start + record_bytes
    end = max(image_end, record_end)
    block = _read_block(shard, sample, start, end - start, read)
    record = parse_record(block[record_start - start : record_end - start], f"{shard}:{sample}")
    if len(record["captions"]) != num_captions or hash64(record["image_id"]) != image_id:
        raise DataError(
            f"Sample {sample} of {shard} is not the one that its row index {index_path(shard).name} describes: shard "
            "and index come from different builds. Copy both again, or delete them and run the build_shards.py command "
            "again."
        )
    second = b""
    if record.get(SECOND_IMAGE_FIELD):
        second = _read_block(shard, sample, second_image_offset(end), record[SECOND_IMAGE_FIELD], read)
    return RawSample(block[image_start - start : image_end - start], record, image_id, second)


def _read_block(shard: Path, sample: str, offset: int, num_bytes: int, read: Callable[[int, int], bytes]) -> bytes:
    block = read(offset, num_bytes)
    if len(block) != num_bytes:
        raise DataError(
            f"{shard} ends before byte {offset + num_bytes:,}, where sample {sample} ends: the file was cut "
            "short. Copy or build it again."
        )
    return block


class ShardReader:
    """Reads samples of one local shard in any order, one ``pread`` each. Safe to use after a fork."""

    def __init__(self, shard: Path) -> None:
        """Open a shard and its row index.

        Raises:
            DataError: the shard or its index is missing, or the index is damaged or of another version.
        """
        self.shard = shard
        sidecar = index_path(shard)
        try:
            # A view as a plain array, whose elements are cheaper to read than a memmap's. It keeps the map open.
            self._index: Index = np.lib.format.open_memmap(sidecar, mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise DataError(
                f"The row index {sidecar} cannot be read ({error}). Run the command that built the shards again: "
                "it keeps what exists and builds what is missing."
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
        """Return the sample, and the caption within the sample, of a pair of this shard."""
        first_pair = self._index["first_pair"]
        # np.searchsorted would first copy the strided column, which costs as much as reading 10,000 samples.
        sample = bisect.bisect_right(first_pair, pair) - 1
        return sample, pair - int(first_pair[sample])

    def image_ids(self) -> npt.NDArray[np.uint64]:
        """Return the image id (64-bit hash) of every sample."""
        return np.asarray(self._index["image_id"])

    def read(self, sample: int) -> RawSample:
        """Read one sample, with one system call (two if it has a second image).

        Raises:
            DataError: the shard is shorter than its index says, the record is damaged, or the index belongs to
                another shard.
        """
        with explain_read_errors(self.shard):
            return _read_row(self.shard, self._index[sample], str(sample), self._pread)

    def key(self, sample: int) -> str:
        """Read the key of a sample from the tar, as the index does not hold it.

        Raises:
            DataError: the shard cannot be read.
        """
        header = self._pread(int(self._index[sample]["image_offset"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.TarError as error:
            raise DataError(f"{self.shard} has no header before sample {sample} ({error}). Build it again.") from error
        if len(name) >= tarfile.LENGTH_NAME:  # truncated; the full name is in a header of its own before this one
            keys = [key for key, _ in iterate_samples(self.shard, str(self.shard))]
            return keys[sample]
        folder, _, base = name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    def _pread(self, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._file, num_bytes, offset)

    def close(self) -> None:
        """Close the shard. The reader cannot be used afterwards."""
        os.close(self._file)
