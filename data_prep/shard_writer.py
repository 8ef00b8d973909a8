"""Writes shards, their row indexes and the manifest: the same bytes for any number of workers, complete or not at all.

A plan (data_prep.plan) fixes the order of all samples and cuts it into shards before any image is read. So a shard
depends on its own records alone: workers and jobs of a cluster build shards in any order, and a build that was stopped
goes on with the missing ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bridgetower.errors import DataError
from bridgetower.io.files import sha256_of
from bridgetower.io.storage import EndOfFile, is_remote, publish_bytes, publish_file, read_part
from bridgetower.shards.index import encode_index, index_path, scan_tar
from bridgetower.shards.manifest import MANIFEST_NAME, ShardEntry, Totals
from bridgetower.shards.sample import Sample, clean_caption
from data_prep.convert import Converted, Rejected, convert
from data_prep.exclusion import Exclusion
from data_prep.plan import Plan
from data_prep.record import ImageFile, ImagePolicy, Record

STATE_FOLDER = ".build"
# A part of the digest of a shard's inputs: to be raised when the same input gives other bytes.
_WRITER_VERSION = 4
_TAR_MODE = 0o644
_NOTE_SECONDS = 0.5
_READS_AHEAD = 16
"""Of an object store, in which each read takes tens of milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to build; handed to a worker process."""

    folder: Path
    number: int
    plan: Path
    first: int
    """Number of its first sample in the plan."""
    count: int
    source: str
    images: ImagePolicy
    keep_repeats: bool
    exclusion_digest: str

    @property
    def shard(self) -> Path:
        """The tar."""
        return self.folder / f"{self.number:05d}.tar"

    @property
    def state(self) -> Path:
        """What is written down about the shard when it is finished."""
        return self.folder / STATE_FOLDER / f"{self.number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished shard, as its worker wrote it down."""

    entry: ShardEntry
    totals: Totals


@dataclass(frozen=True)
class Progress:
    """What was done since the last note."""

    samples: int = 0
    """Images read, rejected ones too."""
    images: int = 0
    bytes: int = 0
    rejects: Counter[str] = dataclasses.field(default_factory=Counter)


Note = Callable[[Progress], None]


def build_shard(job: Job, exclusion: Exclusion, note: Note) -> Outcome:
    """Write one shard with its index, if an earlier run has not; runs in a worker.

    Raises:
        DataError: it cannot be written.
    """
    digest = input_digest(job)
    outcome = finished(job, digest, check_content=True)
    if outcome is not None:
        note(Progress(samples=job.count, rejects=Counter(outcome.totals.rejects)))
        return outcome
    with writing(job.shard):
        # Until all of its shards are there again, the folder is not a corpus; and shard and index are two files: only
        # what is noted afterwards belongs together.
        (job.folder / MANIFEST_NAME).unlink(missing_ok=True)
        job.state.unlink(missing_ok=True)
        if is_remote(job.shard):
            with tempfile.TemporaryDirectory(prefix="shard-") as folder:
                return _write(job, exclusion, Path(folder) / job.shard.name, digest, note)
        for leftover in job.folder.glob(f".{job.shard.name}.*.tmp"):  # of a build that was killed
            leftover.unlink(missing_ok=True)
        temporary = job.shard.with_name(f".{job.shard.name}.{os.getpid()}.tmp")
        try:
            return _write(job, exclusion, temporary, digest, note)
        finally:
            temporary.unlink(missing_ok=True)


def input_digest(job: Job) -> str:
    """Changes when the shard's content would; a local image file counts as another when its size or time is."""
    digest = hashlib.sha256()
    policy = [_WRITER_VERSION, job.source, dataclasses.asdict(job.images), job.keep_repeats, job.exclusion_digest]
    digest.update(json.dumps(policy).encode())
    stamp = lru_cache(maxsize=64)(_stamp)  # thousands of records can lie in the same tar
    for record in _plan(job.plan).records(job.first, job.count):
        images = [
            [str(image.path), image.offset, image.num_bytes, stamp(image.path)]
            for image in (record.image, record.second_image)
            if image is not None
        ]
        line = [record.key, images, record.image_id, record.captions, record.annotations, record.meta]
        digest.update(json.dumps(line, sort_keys=True).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _plan(file: Path) -> Plan:
    return Plan(file)


def _stamp(file: Path) -> tuple[int, ...]:
    if is_remote(file):  # a question per file would take hours
        return ()
    try:
        status = file.stat()
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns


def finished(job: Job, digest: str, *, check_content: bool) -> Outcome | None:
    """What an earlier run wrote down for a shard, if its input and its files are still the same.

    Args:
        check_content: compare the checksum of a local shard, too; of a remote one only the size is known.
    """
    try:
        state = json.loads(job.state.read_bytes())
        if state["digest"] != digest:
            return None
        outcome = Outcome(entry=ShardEntry(**state["entry"]), totals=Totals(**state["totals"]))
        if outcome.entry.samples:
            if job.shard.stat().st_size != outcome.entry.bytes or not index_path(job.shard).is_file():
                return None
            if check_content and not is_remote(job.shard) and sha256_of(job.shard) != outcome.entry.sha256:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return outcome


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do when the disk or the store refuses."""
    cure = "Make room or correct the permissions, and run the command again: finished shards are kept."
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}). {cure}") from error
    except DataError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        # Clients of object stores have error classes of their own.
        raise DataError(f"{path} cannot be written ({type(error).__name__}: {error}). {cure}") from error


def _write(job: Job, exclusion: Exclusion, temporary: Path, digest: str, note: Note) -> Outcome:
    ledger = Ledger(note)
    with temporary.open("wb") as file:
        # webdataset's TarWriter writes the same bytes, but to import it is to import torch, in every worker.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record, raw in _read_ahead(_plan(job.plan).records(job.first, job.count)):
                sample = make_sample(record, raw, job, exclusion, ledger)
                if sample is not None:
                    _add(tar, sample)
        file.flush()
        os.fsync(file.fileno())
    entry = ShardEntry(name=job.shard.name, samples=0, pairs=0, bytes=0, sha256="")
    if ledger.images:
        index = scan_tar(temporary, job.shard.name)
        assert len(index) == ledger.images and int(index["num_captions"].sum()) == ledger.captions
        entry = ShardEntry(
            name=job.shard.name,
            samples=ledger.images,
            pairs=ledger.captions,
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
        publish_bytes(index_path(job.shard), encode_index(index))
        publish_file(temporary, job.shard)
    else:
        job.shard.unlink(missing_ok=True)
        index_path(job.shard).unlink(missing_ok=True)
    totals = ledger.totals(entry.bytes)
    assert totals.rows == totals.captions + sum(totals.rejects.values()), totals
    state = {"digest": digest, "entry": dataclasses.asdict(entry), "totals": dataclasses.asdict(totals)}
    publish_bytes(job.state, json.dumps(state).encode())
    ledger.flush()
    return Outcome(entry=entry, totals=totals)


class Ledger:
    """Where every row and every image of a shard went."""

    def __init__(self, note: Note) -> None:
        """Begin a shard.

        Args:
            note: is told now and then what was done since the last time.
        """
        self.rows = self.images_in = self.images = self.captions = self.words = 0
        self.rejects: Counter[str] = Counter()
        self.image_rejects: Counter[str] = Counter()
        self._note, self._last = note, time.monotonic()
        self._samples = self._images = self._bytes = 0
        self._rejects: Counter[str] = Counter()

    def reject(self, reason: str, rows: int = 1) -> None:
        """Count texts that do not become captions."""
        self.rejects[reason] += rows
        self._rejects[reason] += rows

    def reject_image(self, reason: str, rows: int) -> None:
        """Count an image that does not become a sample, with those of its texts that are not counted yet."""
        self.image_rejects[reason] += 1
        self.reject(reason, rows)
        self._tick()

    def accept(self, sample: Sample) -> None:
        """Count a sample."""
        self.images += 1
        self.captions += len(sample.captions)
        self.words += sum(len(caption.split()) for caption in sample.captions)
        self._images += 1
        self._bytes += len(sample.image) + len(sample.second_image)
        self._tick()

    def _tick(self) -> None:
        self._samples += 1
        now = time.monotonic()
        if now - self._last > _NOTE_SECONDS:
            self._last = now
            self.flush()

    def flush(self) -> None:
        """Tell what is not told yet."""
        self._note(Progress(self._samples, self._images, self._bytes, self._rejects))
        self._samples, self._images, self._bytes, self._rejects = 0, 0, 0, Counter()

    def totals(self, num_bytes: int) -> Totals:
        """The sums, for the manifest."""
        return Totals(
            rows=self.rows,
            images_in=self.images_in,
            images=self.images,
            captions=self.captions,
            bytes=num_bytes,
            caption_words=self.words,
            rejects=dict(sorted(self.rejects.items())),
            image_rejects=dict(sorted(self.image_rejects.items())),
        )


_Raw = bytes | Rejected


def _read(image: ImageFile) -> _Raw:
    try:
        return read_part(image.path, image.offset, image.num_bytes)
    except FileNotFoundError:
        return Rejected("image file missing")
    except EndOfFile:  # not its own words, which have a number: reasons are counted together
        return Rejected("image file cut short")
    except OSError as error:
        return Rejected(f"image file unreadable: {error.strerror or type(error).__name__}")
    except ValueError:  # a name with a NUL
        return Rejected("image file missing")


def _read_both(record: Record) -> tuple[_Raw, ...]:
    return tuple(_read(image) for image in (record.image, record.second_image) if image is not None)


def _read_ahead(records: Iterable[Record]) -> Iterator[tuple[Record, tuple[_Raw, ...]]]:
    """Each record with the bytes of its images; several at once where a store answers slowly."""
    pending: deque[tuple[Record, Future[tuple[_Raw, ...]]]] = deque()
    with ThreadPoolExecutor(_READS_AHEAD) as threads:
        for record in records:
            if not is_remote(record.image.path):
                yield record, _read_both(record)
                continue
            pending.append((record, threads.submit(_read_both, record)))
            if len(pending) > _READS_AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def make_sample(record: Record, raw: tuple[_Raw, ...], job: Job, exclusion: Exclusion, ledger: Ledger) -> Sample | None:
    """Bring one record into its final form, or note why that cannot be."""
    ledger.rows += max(1, len(record.captions))
    ledger.images_in += 1
    captions: list[str] = []
    annotations: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    for number, text in enumerate(record.captions):
        caption = clean_caption(text)
        if not caption:
            ledger.reject("empty caption")
        elif caption in seen and not job.keep_repeats:
            ledger.reject("repeated caption")
        else:
            seen.add(caption)
            captions.append(caption)
            annotations += record.annotations[number : number + 1]
    if not captions:
        reason = "empty caption" if record.captions else "no caption"
        ledger.reject_image(reason, 0 if record.captions else 1)
        return None
    try:
        if exclusion.has_id(record.image_id, record.meta):
            raise Rejected("excluded: the id of an excluded image")
        converted = [_converted(part, job.images, str(record.image.path)) for part in raw]
        for one in converted:
            if exclusion.has_hash(one.phash):
                raise Rejected("excluded: looks like an excluded image")
        sample = Sample(
            key=record.key,
            image=converted[0].content,
            image_suffix=converted[0].suffix,
            image_id=record.image_id or _content_id(raw[0]),
            source=job.source,
            captions=tuple(captions),
            annotations=tuple(annotations),
            width_px=converted[0].width_px,
            height_px=converted[0].height_px,
            phash=converted[0].phash,
            second_image=converted[1].content if len(converted) > 1 else b"",
            second_image_suffix=converted[1].suffix if len(converted) > 1 else "",
            meta=record.meta,
        )
    except Rejected as reason:
        ledger.reject_image(str(reason), len(captions))
        return None
    ledger.accept(sample)
    return sample


def _converted(raw: _Raw, images: ImagePolicy, where: str) -> Converted:
    if isinstance(raw, Rejected):
        raise raw
    return convert(raw, images, where)


def _content_id(raw: _Raw) -> str:
    assert isinstance(raw, bytes)
    return f"sha256:{hashlib.sha256(raw).hexdigest()[:32]}"


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, content in sample.members().items():
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")  # of owner 0, without names, from 1970
        member.size, member.mode = len(content), _TAR_MODE
        tar.addfile(member, io.BytesIO(content))
