"""Writes shards, their row indexes and the manifest: the same bytes for any number of workers, complete or not at all.

Records are put in a seeded order and cut into shards by their number, before anything is read. So a shard depends on
its own records alone: workers build shards in any order, and a build that was stopped goes on with the missing ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bridgetower import draws
from bridgetower.data.index import index_path, scan_tar
from bridgetower.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, Totals, write_manifest
from bridgetower.data.picture import PictureTooLarge, flatten, opened, orientation_of
from bridgetower.data.sample import Sample, clean_captions
from bridgetower.errors import ConfigError, DataError
from bridgetower.files import claim_folder, sha256_of, write_atomically
from data_prep.record import ImagePolicy, Record

_STATE_FOLDER = ".build"
_TAR_MODE = 0o644
_PLAIN_FORMATS = {"JPEG": "jpg", "PNG": "png"}
_MAX_JPEG_SIDE_PX = 65_500  # of libjpeg
# A part of the digest of a shard's inputs: to be raised when the same input gives other bytes.
_WRITER_VERSION = 2


class Rejected(Exception):
    """A record cannot become a sample; the text is the reason, counted in the manifest."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to build; handed to a worker process."""

    folder: Path
    number: int
    source: str
    images: ImagePolicy
    records: tuple[Record, ...]

    @property
    def shard(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    @property
    def state(self) -> Path:
        return self.folder / _STATE_FOLDER / f"{self.number:05d}.json"

    def digest(self) -> str:
        """Changes when the shard's content would; an image file counts as another when its size or time is."""
        content = [_WRITER_VERSION, self.source, dataclasses.asdict(self.images)]
        content += [[r.key, str(r.image), _stamp(r.image), r.image_id, r.captions, dict(r.meta)] for r in self.records]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(file: Path) -> list[int]:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """A finished shard, as its worker wrote it down."""

    entry: ShardEntry
    totals: Totals


def build_corpus(
    records: Iterable[Record],
    out: Path,
    *,
    source: str,
    attribution: str,
    images: ImagePolicy,
    samples_per_shard: int,
    seed: int,
    workers: int,
    on_progress: Callable[[int, int, int], None] = lambda done, total, images_written: None,
) -> dict[str, Manifest]:
    """Build or complete a corpus; each split of the records becomes a folder with shards and a manifest.

    Args:
        seed: of the order of the records.
        workers: processes; the result does not depend on them.
        on_progress: called after each shard with shards done, all shards, and images written in this call.

    Returns: the manifest of each split ("" where the source has no splits).

    Raises:
        ConfigError: ``out`` holds a corpus built with other settings.
        DataError: the records contradict each other, or the disk does not take a shard.
    """
    settings = {
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        **dataclasses.asdict(images),
    }
    plans = {split: _plan(own, seed) for split, own in _by_split(records).items()}
    jobs = [
        _Job(
            folder=out / split,
            number=first // samples_per_shard,
            source=source,
            images=images,
            records=tuple(ordered[first : first + samples_per_shard]),
        )
        for split, ordered in plans.items()
        for first in range(0, len(ordered), samples_per_shard)
    ]
    manifests = {}
    with ExitStack() as claimed:
        for split in plans:
            claimed.callback(os.close, _claim(out / split, {"source": source, "split": split, **settings}))
        outcomes = _run(jobs, workers, on_progress)
        for split in plans:
            folder = out / split
            own = [outcomes[job.shard] for job in jobs if job.folder == folder]
            _remove_beyond(folder, len(own))
            manifests[split] = Manifest(
                source=source,
                split=split,
                settings=settings,
                attribution=attribution,
                totals=_add_up([outcome.totals for outcome in own]),
                shards=tuple(outcome.entry for outcome in own if outcome.entry.samples),
            )
            with _writing(folder / MANIFEST_NAME):
                write_manifest(folder, manifests[split])
    return manifests


def _by_split(records: Iterable[Record]) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        splits[record.split].append(record)
    if not splits:
        raise DataError("The source gave no records: is --raw the right folder, and its caption file not empty?")
    if "" in splits and len(splits) > 1:
        named = ", ".join(name for name in splits if name)
        raise DataError(f"{len(splits[''])} records have no split, others are in {named}. Give each one a split.")
    for name in splits:
        if name and not all(letter.isalnum() or letter in "_-" for letter in name):
            raise DataError(f"The split {name!r} cannot be a folder name: use letters, digits, _ and -.")
    return dict(splits)


def _plan(records: list[Record], seed: int) -> list[Record]:
    """The records in an order that depends on the seed and their keys alone."""
    stream = draws.key(seed, "order of records")
    placed = sorted(records, key=lambda record: (draws.key(stream, record.key), record.key))
    for first, second in itertools.pairwise(placed):
        if first.key == second.key:
            raise DataError(
                f"Two images have the key {first.key!r}: {first.image} and {second.image}. Keys are made from file "
                "names; rename one."
            )
    return placed


def _claim(folder: Path, settings: dict[str, Any]) -> int:
    """Take a folder for this build; a second build at the same time, or one with other settings, is refused.

    Returns: the descriptor whose closing gives the folder free.
    """
    state = folder / _STATE_FOLDER
    lock = claim_folder(state)
    try:
        _check_settings(folder, settings)
        # What a build that was killed had begun to write.
        for leftover in (*folder.glob(".*.tmp"), *state.glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    known = folder / _STATE_FOLDER / "settings.json"
    if known.exists():
        before = json.loads(known.read_bytes())
        changed = [f"{n}: {before.get(n)} -> {settings.get(n)}" for n in settings if before.get(n) != settings.get(n)]
        if changed:
            raise ConfigError(
                f"{folder} holds a build with other settings ({'; '.join(changed)}). Use another --out, or delete it."
            )
    elif (folder / MANIFEST_NAME).exists() or any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} already holds shards that this program did not build. Use another --out.")
    else:
        with _writing(known):
            write_atomically(known, json.dumps(settings, indent=1).encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what to do when the disk refuses."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}). Make room or correct the permissions, and run the "
            "command again: finished shards are kept."
        ) from error


def _run(jobs: Sequence[_Job], workers: int, on_progress: Callable[[int, int, int], None]) -> dict[Path, _Outcome]:
    with ThreadPoolExecutor(max(1, workers)) as threads:  # reading and hashing let other threads run
        found = zip(jobs, threads.map(_finished, jobs), strict=True)
        outcomes = {job.shard: outcome for job, outcome in found if outcome is not None}
    missing = [job for job in jobs if job.shard not in outcomes]
    images_written = 0
    for folder in {job.folder for job in missing}:
        # Until all of its shards are there again, the folder is not a corpus.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)

    def note(job: _Job, outcome: _Outcome) -> None:
        nonlocal images_written
        outcomes[job.shard] = outcome
        images_written += outcome.entry.samples
        on_progress(len(outcomes), len(jobs), images_written)

    on_progress(len(outcomes), len(jobs), 0)
    if workers <= 1 or len(missing) <= 1:
        for job in missing:
            note(job, _build(job))
        return outcomes
    # A clean server process forks the workers: no threads of this one are copied.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(_build, job): job for job in missing}
        try:
            for future in as_completed(futures):
                note(futures[future], future.result())
        except BrokenProcessPool:
            raise DataError(
                "A worker process died, most likely for want of memory. Run the command again with fewer --workers: "
                "finished shards are kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _end_with_parent() -> None:
    """Runs in a new worker: one whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finished(job: _Job) -> _Outcome | None:
    """What an earlier run wrote down for a shard, if its input and its files are still the same."""
    try:
        state = json.loads(job.state.read_bytes())
        outcome = _Outcome(entry=ShardEntry(**state["entry"]), totals=Totals(**state["totals"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state["digest"] != job.digest():
        return None
    if outcome.entry.samples:
        if not job.shard.is_file() or job.shard.stat().st_size != outcome.entry.bytes:
            return None
        if not index_path(job.shard).is_file() or sha256_of(job.shard) != outcome.entry.sha256:
            return None
    return outcome


def _build(job: _Job) -> _Outcome:
    """Write one shard with its index; runs in a worker."""
    temporary = job.shard.with_name(f".{job.shard.name}.{os.getpid()}.tmp")
    try:
        with _writing(job.shard):
            return _write(job, temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _write(job: _Job, temporary: Path) -> _Outcome:
    rejects: Counter[str] = Counter()
    captions = words = 0
    with temporary.open("wb") as file:
        # webdataset's TarWriter writes the same bytes, but to import it is to import torch, in every worker.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in job.records:
                try:
                    sample = make_sample(record, job.source, job.images)
                except Rejected as reason:
                    rejects[str(reason)] += 1
                    continue
                _add(tar, sample)
                captions += len(sample.captions)
                words += sum(len(caption.split()) for caption in sample.captions)
        file.flush()
        os.fsync(file.fileno())
    num_samples = len(job.records) - sum(rejects.values())
    entry = ShardEntry(name=job.shard.name, samples=0, pairs=0, bytes=0, sha256="")
    job.state.unlink(missing_ok=True)  # shard and index are two files: only what is noted afterwards belongs together
    if num_samples:
        index = scan_tar(temporary, job.shard.name)
        assert len(index) == num_samples and int(index["num_captions"].sum()) == captions
        index_file = io.BytesIO()
        np.save(index_file, index)
        entry = ShardEntry(
            name=job.shard.name,
            samples=num_samples,
            pairs=captions,
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
        write_atomically(index_path(job.shard), index_file.getvalue())
        os.replace(temporary, job.shard)
    totals = Totals(
        rows=len(job.records),
        images=num_samples,
        captions=captions,
        bytes=entry.bytes,
        caption_words=words,
        rejects=dict(sorted(rejects.items())),
    )
    state = {"digest": job.digest(), "entry": dataclasses.asdict(entry), "totals": dataclasses.asdict(totals)}
    write_atomically(job.state, json.dumps(state).encode())
    return _Outcome(entry=entry, totals=totals)


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, content in sorted(sample.members().items()):
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")  # of owner 0, without names, from 1970
        member.size, member.mode = len(content), _TAR_MODE
        tar.addfile(member, io.BytesIO(content))


def make_sample(record: Record, source: str, images: ImagePolicy) -> Sample:
    """Read one record and bring it into its final form.

    Raises:
        Rejected: with the reason.
    """
    captions = clean_captions(record.captions)
    if not captions:
        raise Rejected("no caption")
    try:
        raw = record.image.read_bytes()
    except FileNotFoundError:
        raise Rejected("image file missing") from None
    except OSError as error:
        raise Rejected(f"image file unreadable: {error.strerror}") from None
    if not raw:
        raise Rejected("image file empty")
    content, suffix, (width, height) = _convert(raw, images, str(record.image))
    return Sample(
        key=record.key,
        image=content,
        image_suffix=suffix,
        image_id=record.image_id or f"sha256:{hashlib.sha256(raw).hexdigest()[:32]}",
        source=source,
        captions=captions,
        width_px=width,
        height_px=height,
        meta=record.meta,
    )


def _convert(raw: bytes, images: ImagePolicy, where: str) -> tuple[bytes, str, tuple[int, int]]:
    """The bytes to store, their suffix, and the size in pixels. Decodes fully, so that damaged files are found."""
    try:
        with opened(raw, where) as image:
            is_plain = (
                image.format in _PLAIN_FORMATS
                and image.mode in ("RGB", "L")
                and orientation_of(image) == 1
                and "transparency" not in image.info
                and not getattr(image, "is_animated", False)
            )
            is_small = not images.short_side_px or min(image.size) <= images.short_side_px
            if is_plain and is_small:
                image.load()
                return raw, _PLAIN_FORMATS[str(image.format)], image.size
            picture = flatten(image)
    except PictureTooLarge:
        raise Rejected("image has too many pixels") from None
    except DataError:
        raise Rejected("image cannot be decoded") from None
    if images.short_side_px and min(picture.size) > images.short_side_px:
        scale = images.short_side_px / min(picture.size)
        longer = max(images.short_side_px, round(max(picture.size) * scale))
        is_wide = picture.width >= picture.height
        new_size = (longer, images.short_side_px) if is_wide else (images.short_side_px, longer)
        picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if images.lossless:
        picture.save(stream, "PNG", optimize=True)
        return stream.getvalue(), "png", picture.size
    if max(picture.size) > _MAX_JPEG_SIDE_PX:
        raise Rejected(f"image longer than {_MAX_JPEG_SIDE_PX:,} pixels")
    picture.save(stream, "JPEG", quality=images.jpeg_quality, subsampling=0)
    return stream.getvalue(), "jpg", picture.size


def _add_up(parts: Sequence[Totals]) -> Totals:
    rejects: Counter[str] = Counter()
    for part in parts:
        rejects.update(part.rejects)
    return Totals(
        rows=sum(part.rows for part in parts),
        images=sum(part.images for part in parts),
        captions=sum(part.captions for part in parts),
        bytes=sum(part.bytes for part in parts),
        caption_words=sum(part.caption_words for part in parts),
        rejects=dict(sorted(rejects.items())),
    )


def _remove_beyond(folder: Path, num_shards: int) -> None:
    """Delete shards of an earlier build of the same settings from more input."""
    for shard in folder.glob("[0-9]" * 5 + ".tar"):
        if int(shard.stem) >= num_shards:
            shard.unlink()
            index_path(shard).unlink(missing_ok=True)
