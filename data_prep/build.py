"""Builds a planned corpus: its shards, on all cores or on many machines, and a manifest once every shard exists."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import claim_folder
from bridgetower.io.storage import explain_read_errors, is_remote, publish_bytes
from bridgetower.shards.index import index_path
from bridgetower.shards.manifest import MANIFEST_NAME, Manifest, Totals, write_manifest
from data_prep.contact_sheet import SHEET_NAME, draw_contact_sheet
from data_prep.exclusion import Exclusion
from data_prep.ledger import Note, Progress
from data_prep.plan import Plan, PlannedSplit
from data_prep.record import ImagePolicy
from data_prep.shard_writer import (
    STATE_FOLDER,
    Job,
    Outcome,
    build_shard,
    compute_input_digest,
    explain_write_errors,
    load_outcome,
)

_POLL_SECONDS = 0.2
"""Longest pause between two updates of the display."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything besides the input that the bytes of a corpus depend on."""

    source: str
    attribution: str
    images: ImagePolicy
    samples_per_shard: int
    seed: int
    """Seed of the order of the images."""
    keep_repeats: bool = False
    """True if equal texts of an image stay separate rows, as questions do."""
    exclusion: Exclusion = field(default_factory=Exclusion)

    def to_record(self, split: str) -> dict[str, Any]:
        """Return the settings as the manifest shows them, and as a later build into the same folder must have them."""
        return {
            "source": self.source,
            "split": split,
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
            **dataclasses.asdict(self.images),
            "keep_repeats": self.keep_repeats,
            "exclusion": self.exclusion.digest,
        }


@dataclass(frozen=True)
class Slice:
    """The shards that one of several jobs builds: those whose number modulo ``count`` is ``number``."""

    number: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a build has got."""

    shards: int = 0
    """Number of finished shards."""
    all_shards: int = 0
    samples: int = 0
    """Number of images read, rejected ones included."""
    all_samples: int = 0
    images: int = 0
    """Number of images written."""
    bytes: int = 0
    """Bytes of the images written."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Number of rejected texts by reason."""


Show = Callable[[State], None]


def build_corpus(
    plan: Plan,
    out: Path,
    settings: Settings,
    *,
    workers: int,
    only_slice: Slice | None = None,
    only_merge: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    show: Show = lambda state: None,
) -> dict[str, Manifest] | list[Path]:
    """Build or complete a corpus; each split of the plan becomes a folder with shards and a manifest.

    Args:
        workers: number of processes; the result does not depend on it.
        only_slice: build only these shards; the job after which no shard is missing writes the manifests.
        only_merge: build no shard, only write the manifests.
        extra_files: content of the source's files that belong beside the shards, by file name.
        show: called with the state of the build, several times a second.

    Returns: the manifest of each split ("" where the source has no splits); or, with ``only_slice``, the shards that
        other jobs have yet to build.

    Raises:
        ConfigError: ``out`` holds a corpus built with other settings.
        DataError: a shard cannot be written, another build is running, or shards to merge are missing.
    """
    splits = plan.splits()
    jobs = [job for split in splits for job in _make_jobs(plan, split, out, settings)]
    selected_jobs = [] if only_merge else jobs
    if only_slice is not None and not only_merge:
        selected_jobs = [job for number, job in enumerate(jobs) if number % only_slice.count == only_slice.number]
    with ExitStack() as claims:
        for split in splits:
            _claim(out / split.name, settings.to_record(split.name), only_slice, claims)
        outcomes = _run(selected_jobs, settings.exclusion, workers, show)
        missing = []
        other_jobs = [job for job in jobs if job.shard not in outcomes]
        for job, outcome in zip(other_jobs, _load_outcomes(other_jobs, workers), strict=True):
            if outcome is None:
                missing.append(job.shard)
            else:
                outcomes[job.shard] = outcome
        if missing and only_merge:
            names = ", ".join(str(shard) for shard in missing[:5])
            raise DataError(
                f"{len(missing)} of {len(jobs)} shards are missing, or were built from other input ({names}...). First "
                "run the jobs that build them (--slice) to their end, with the same flags."
            )
        if missing:
            return missing
        manifests = {}
        for split in splits:
            folder = out / split.name
            manifests[split.name] = _publish(folder, split, [j for j in jobs if j.folder == folder], outcomes, settings)
        for name, content in (extra_files or {}).items():
            with explain_write_errors(out / name):
                publish_bytes(out / name, content)
    return manifests


def _make_jobs(plan: Plan, split: PlannedSplit, out: Path, settings: Settings) -> Iterator[Job]:
    size = settings.samples_per_shard
    for number, first in enumerate(range(0, split.samples, size)):
        yield Job(
            folder=out / split.name,
            number=number,
            plan=plan.file,
            first=split.first + first,
            count=min(size, split.samples - first),
            source=settings.source,
            images=settings.images,
            keep_repeats=settings.keep_repeats,
            exclusion_digest=settings.exclusion.digest,
        )


def _claim(folder: Path, settings: dict[str, Any], only_slice: Slice | None, claims: ExitStack) -> None:
    """Lock a folder for this build.

    Raises:
        ConfigError: it holds a build with other settings.
        DataError: another build of the same shards is running.
    """
    state = folder / STATE_FOLDER
    if is_remote(folder):
        # A store has no locks, and needs none here: two builds at once write the same bytes.
        _check_settings(folder, settings)
        return
    # The jobs of an array share the folder with each other, but not with a build of all shards. The second lock keeps
    # two jobs from building the same slice.
    claims.callback(os.close, claim_folder(state, shared=only_slice is not None))
    if only_slice is not None:
        name = f".slice-{only_slice.number}-of-{only_slice.count}.lock"
        claims.callback(os.close, claim_folder(state, name=name))
    _check_settings(folder, settings)
    if only_slice is None:
        for leftover in (*folder.glob(".*.tmp"), *state.glob(".*.tmp")):  # left by a build that was killed
            leftover.unlink(missing_ok=True)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / STATE_FOLDER / "settings.json"
    with explain_read_errors(file):
        is_known = file.exists()
        before = json.loads(file.read_bytes()) if is_known else {}
        is_foreign = (folder / MANIFEST_NAME).exists() or any(folder.glob("*.tar"))
    if is_known:
        changed = [f"{n}: {before.get(n)} -> {settings[n]}" for n in settings if before.get(n) != settings[n]]
        if changed:
            raise ConfigError(
                f"{folder} holds a build with other settings ({'; '.join(changed)}). Use another --out, or delete the "
                "folder."
            )
    elif is_foreign:
        raise ConfigError(f"{folder} already holds shards that this program did not build. Use another --out.")
    else:
        with explain_write_errors(file):
            publish_bytes(file, json.dumps(settings, indent=1).encode())


def _run(jobs: Sequence[Job], exclusion: Exclusion, workers: int, show: Show) -> dict[Path, Outcome]:
    board = _Board(jobs, show)
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            board.finish(job, build_shard(job, exclusion, board.note))
        return board.outcomes
    # forkserver: a server process without threads forks the workers. Forking this process, which has threads, could
    # copy a lock that one of them holds.
    context = multiprocessing.get_context("forkserver")
    notes: multiprocessing.Queue[Progress] = context.Queue()
    other_children = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (notes, exclusion)) as pool:
        futures = {pool.submit(_build, job): job for job in jobs}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, "FIRST_COMPLETED")
                for note in _drain(notes):
                    board.note(note)
                for future in done:
                    board.finish(futures[future], future.result())
        except BrokenProcessPool:
            raise DataError(
                "A worker process died, most likely because memory ran out. Run the command again with fewer "
                "--workers: finished shards are kept."
            ) from None
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()) - other_children:
                worker.kill()  # its shard may take minutes more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return board.outcomes


class _Board:
    """Adds up what the workers report, and shows the sums."""

    def __init__(self, jobs: Sequence[Job], show: Show) -> None:
        self.outcomes: dict[Path, Outcome] = {}
        self._jobs, self._show = jobs, show
        self._samples = self._images = self._bytes = 0
        self._rejects: Counter[str] = Counter()
        self._tell()

    def note(self, progress: Progress) -> None:
        self._samples += progress.samples
        self._images += progress.images
        self._bytes += progress.bytes
        self._rejects.update(progress.rejects)
        self._tell()

    def finish(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.shard] = outcome
        self._tell()

    def _tell(self) -> None:
        self._show(
            State(
                shards=len(self.outcomes),
                all_shards=len(self._jobs),
                samples=self._samples,
                all_samples=sum(job.count for job in self._jobs),
                images=self._images,
                bytes=self._bytes,
                rejects=dict(self._rejects),
            )
        )


def _drain(notes: multiprocessing.Queue[Progress]) -> Iterator[Progress]:
    while True:
        try:
            yield notes.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """State of a worker process, set once when it starts: how to report progress, and which images to drop."""

    note: Note
    exclusion: Exclusion


def _start_worker(notes: multiprocessing.Queue[Progress], exclusion: Exclusion) -> None:
    """Prepare a new worker process, and make it exit when its parent does.

    The pool does not do the latter: a worker whose parent was killed would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent handles it
    notes.cancel_join_thread()  # unread progress must not keep a worker from exiting
    _Worker.note, _Worker.exclusion = staticmethod(notes.put), exclusion
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _build(job: Job) -> Outcome:
    return build_shard(job, _Worker.exclusion, _Worker.note)


def _load_outcomes(jobs: Sequence[Job], workers: int) -> list[Outcome | None]:
    """Read what other processes wrote down for these shards; None for a shard that is not finished."""
    with ThreadPoolExecutor(max(1, workers)) as threads:
        return list(threads.map(lambda job: load_outcome(job, compute_input_digest(job), check_content=False), jobs))


def _publish(
    folder: Path, split: PlannedSplit, jobs: Sequence[Job], outcomes: Mapping[Path, Outcome], settings: Settings
) -> Manifest:
    split_outcomes = [outcomes[job.shard] for job in jobs]
    record = settings.to_record(split.name)
    manifest = Manifest(
        source=record.pop("source"),
        split=record.pop("split"),
        settings=record,
        attribution=settings.attribution,
        totals=add_totals([outcome.totals for outcome in split_outcomes], split.rejects),
        shards=tuple(outcome.entry for outcome in split_outcomes if outcome.entry.samples),
    )
    assert manifest.totals.rows == split.rows, (manifest.totals, split)
    with explain_write_errors(folder / MANIFEST_NAME):
        _remove_shards_from(folder, len(split_outcomes))
        publish_bytes(folder / SHEET_NAME, draw_contact_sheet(folder, manifest, settings.seed))
        write_manifest(folder, manifest)
    return manifest


def add_totals(parts: Sequence[Totals], source_rejects: Mapping[str, int]) -> Totals:
    """Add the totals of a corpus's shards.

    Args:
        source_rejects: number of rows that the source itself dropped, by reason.
    """
    rejects = Counter(source_rejects)
    image_rejects: Counter[str] = Counter()
    for part in parts:
        rejects.update(part.rejects)
        image_rejects.update(part.image_rejects)
    return Totals(
        rows=sum(part.rows for part in parts) + sum(source_rejects.values()),
        images_in=sum(part.images_in for part in parts),
        images=sum(part.images for part in parts),
        captions=sum(part.captions for part in parts),
        bytes=sum(part.bytes for part in parts),
        caption_words=sum(part.caption_words for part in parts),
        rejects=dict(sorted(rejects.items())),
        image_rejects=dict(sorted(image_rejects.items())),
    )


def _remove_shards_from(folder: Path, first: int) -> None:
    """Delete the shards from this number on: an earlier build with the same settings, but more input, left them."""
    for shard in folder.glob("[0-9]" * 5 + ".tar"):
        if int(shard.stem) >= first:
            shard.unlink()
            index_path(shard).unlink(missing_ok=True)


def count_cores() -> int:
    """Count the cores that this process may use: a Slurm job has only some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
