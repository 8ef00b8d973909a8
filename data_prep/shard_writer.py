"""Writes one shard with its row index: complete or not at all, and the same bytes for any number of workers.

A plan (data_prep.plan) fixes the order of all samples before any image is read. So a shard depends only on its own
records: workers and jobs of a cluster build shards in any order, and a build that was stopped continues with the
missing ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
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
from data_prep.ledger import Ledger, Note, Progress
from data_prep.plan import Plan
from data_prep.record import ImageFile, ImagePolicy, Record

STATE_FOLDER = ".build"
"""Folder beside the shards with the settings of the build, its locks and the outcome of each finished shard."""
_WRITER_VERSION = 4
"""Enters the digest of a shard's input; to be raised in every change after which the same input gives other bytes."""
_TAR_MODE = 0o644
_READS_AHEAD = 16
"""Number of images read at once from an object store, where each read takes tens of milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to build, as a worker process gets it."""

    folder: Path
    number: int
    """Number of the shard, from which it gets its name."""
    plan: Path
    first: int
    """Number of its first sample in the plan."""
    count: int
    """Number of its samples."""
    source: str
    images: ImagePolicy
    keep_repeats: bool
    exclusion_digest: str

    @property
    def shard(self) -> Path:
        """Path of the tar."""
        return self.folder / f"{self.number:05d}.tar"

    @property
    def state(self) -> Path:
        """Path of the file with the outcome, which is written when the shard is finished."""
        return self.folder / STATE_FOLDER / f"{self.number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished shard's line of the manifest, and its counts."""

    entry: ShardEntry
    totals: Totals


def build_shard(job: Job, exclusion: Exclusion, note: Note) -> Outcome:
    """Write one shard with its index, unless an earlier run has done so; runs in a worker process.

    Args:
        exclusion: images to drop.
        note: called now and then with the work done since its last call.

    Raises:
        DataError: the shard cannot be written.
    """
    digest = compute_input_digest(job)
    outcome = load_outcome(job, digest, check_content=True)
    if outcome is not None:
        note(Progress(samples=job.count, rejects=Counter(outcome.totals.rejects)))
        return outcome
    with explain_write_errors(job.shard):
        # The folder is not a corpus until all shards are rebuilt, so its manifest goes first. The old outcome goes as
        # well: a shard and its index are two files, and only the outcome, written last, says that they belong together.
        (job.folder / MANIFEST_NAME).unlink(missing_ok=True)
        job.state.unlink(missing_ok=True)
        if is_remote(job.shard):
            with tempfile.TemporaryDirectory(prefix="shard-") as folder:
                return _write(job, exclusion, Path(folder) / job.shard.name, digest, note)
        for leftover in job.folder.glob(f".{job.shard.name}.*.tmp"):  # left by a build that was killed
            leftover.unlink(missing_ok=True)
        temporary = job.shard.with_name(f".{job.shard.name}.{os.getpid()}.tmp")
        try:
            return _write(job, exclusion, temporary, digest, note)
        finally:
            temporary.unlink(missing_ok=True)


def compute_input_digest(job: Job) -> str:
    """Return a digest that changes whenever the shard's content would.

    The bytes of the images are not read for it: a local image file counts as changed when its size or time of change
    is another one.
    """
    digest = hashlib.sha256()
    policy = [_WRITER_VERSION, job.source, dataclasses.asdict(job.images), job.keep_repeats, job.exclusion_digest]
    digest.update(json.dumps(policy).encode())
    stamp = lru_cache(maxsize=64)(_stamp)  # thousands of records may be in the same tar
    for record in _open_plan(job.plan).records(job.first, job.count):
        images = [
            [str(image.path), image.offset, image.num_bytes, stamp(image.path)]
            for image in (record.image, record.second_image)
            if image is not None
        ]
        line = [record.key, images, record.image_id, record.captions, record.annotations, record.meta]
        digest.update(json.dumps(line, sort_keys=True).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _open_plan(file: Path) -> Plan:
    return Plan(file)


def _stamp(file: Path) -> tuple[int, ...]:
    """Return size and time of change of a local file; nothing for others, since a request per file would take hours."""
    if is_remote(file):
        return ()
    try:
        status = file.stat()
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns


def load_outcome(job: Job, digest: str, *, check_content: bool) -> Outcome | None:
    """Return the outcome that an earlier run wrote; None if there is none, or the input or the files have changed.

    Args:
        check_content: also compare the checksum of a local shard; of a remote one, only the size is compared.
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
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a disk or store, raised in the block, into one that says what to do.

    Raises:
        DataError: the file cannot be written.
    """
    suggestion = "Make room or correct the permissions, and run the command again: finished shards are kept."
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}). {suggestion}") from error
    except DataError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        # Clients of object stores have error classes of their own.
        raise DataError(f"{path} cannot be written ({type(error).__name__}: {error}). {suggestion}") from error


def _write(job: Job, exclusion: Exclusion, temporary: Path, digest: str, note: Note) -> Outcome:
    ledger = Ledger(note)
    with temporary.open("wb") as file:
        # webdataset's TarWriter writes the same bytes, but its import would load torch in every worker.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record, raw in _read_ahead(_open_plan(job.plan).records(job.first, job.count)):
                sample = make_sample(record, raw, job, exclusion, ledger)
                if sample is not None:
                    _add_members(tar, sample)
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


_Raw = bytes | Rejected
"""Bytes of an image file, or the reason why it cannot be read."""


def _read(image: ImageFile) -> _Raw:
    try:
        return read_part(image.path, image.offset, image.num_bytes)
    except FileNotFoundError:
        return Rejected("image file missing")
    except EndOfFile:  # its message has a number in it, and could not be counted together with others
        return Rejected("image file cut short")
    except OSError as error:
        return Rejected(f"image file unreadable: {error.strerror or type(error).__name__}")
    except ValueError:  # the name has a NUL
        return Rejected("image file missing")


def _read_both(record: Record) -> tuple[_Raw, ...]:
    return tuple(_read(image) for image in (record.image, record.second_image) if image is not None)


def _read_ahead(records: Iterable[Record]) -> Iterator[tuple[Record, tuple[_Raw, ...]]]:
    """Yield each record with the bytes of its images; several are read at once from a store, which answers slowly."""
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
    """Convert a record to the sample that is written. Returns: None if it is rejected, which the ledger counts."""
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
        images = [_convert(content, job.images, str(record.image.path)) for content in raw]
        for image in images:
            if exclusion.has_hash(image.phash):
                raise Rejected("excluded: looks like an excluded image")
        sample = Sample(
            key=record.key,
            image=images[0].content,
            image_suffix=images[0].suffix,
            image_id=record.image_id or _make_content_id(raw[0]),
            source=job.source,
            captions=tuple(captions),
            annotations=tuple(annotations),
            width_px=images[0].width_px,
            height_px=images[0].height_px,
            phash=images[0].phash,
            second_image=images[1].content if len(images) > 1 else b"",
            second_image_suffix=images[1].suffix if len(images) > 1 else "",
            meta=record.meta,
        )
    except Rejected as reason:
        ledger.reject_image(str(reason), len(captions))
        return None
    ledger.accept(sample)
    return sample


def _convert(raw: _Raw, images: ImagePolicy, where: str) -> Converted:
    if isinstance(raw, Rejected):
        raise raw
    return convert(raw, images, where)


def _make_content_id(raw: _Raw) -> str:
    assert isinstance(raw, bytes)
    return f"sha256:{hashlib.sha256(raw).hexdigest()[:32]}"


def _add_members(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, content in sample.members().items():
        # TarInfo's defaults are owner 0 without a name, and a time of 1970: the same bytes in every build.
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")
        member.size, member.mode = len(content), _TAR_MODE
        tar.addfile(member, io.BytesIO(content))
