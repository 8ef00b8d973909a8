"""Builds a corpus: plan, shards on all cores or on many machines, and a manifest once every shard is there."""

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
from data_prep.contact_sheet import SHEET_NAME, contact_sheet
from data_prep.exclusion import Exclusion
from data_prep.plan import Plan, PlannedSplit
from data_prep.record import ImagePolicy
from data_prep.shard_writer import (
    STATE_FOLDER,
    Job,
    Note,
    Outcome,
    Progress,
    build_shard,
    finished,
    input_digest,
    writing,
)

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the bytes of a corpus depend on, beside its input."""

    source: str
    attribution: str
    images: ImagePolicy
    samples_per_shard: int
    seed: int
    """Of the order of the images."""
    keep_repeats: bool = False
    """Equal texts of an image are different rows: questions."""
    exclusion: Exclusion = field(default_factory=Exclusion)

    def recorded(self, split: str) -> dict[str, Any]:
        """As the manifest shows them, and as a later build has to repeat them."""
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
    """Which shards a job builds: those whose number is ``number`` modulo ``count``."""

    number: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a build is."""

    shards: int = 0
    all_shards: int = 0
    samples: int = 0
    """Images seen, rejected ones too."""
    all_samples: int = 0
    images: int = 0
    bytes: int = 0
    rejects: Mapping[str, int] = field(default_factory=dict)


Show = Callable[[State], None]


def build_corpus(
    plan: Plan,
    out: Path,
    settings: Settings,
    *,
    workers: int,
    part: Slice | None = None,
    only_merge: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    show: Show = lambda state: None,
) -> dict[str, Manifest] | list[Path]:
    """Build or complete a corpus; each split of the plan becomes a folder with shards and a manifest.

    Args:
        workers: processes; the result does not depend on them.
        part: build only these shards; the job that finds all shards there writes the manifests.
        only_merge: build no shard, write the manifests.
        extra_files: files of the source that belong beside the shards, by name.
        show: called now and then.

    Returns: the manifest of each split ("" where the source has no splits); or, with ``part``, the shards that other
        jobs have yet to build.

    Raises:
        ConfigError: ``out`` holds a corpus built with other settings.
        DataError: the disk or store does not take a shard, another build is at work, or shards to merge are missing.
    """
    splits = plan.splits()
    jobs = [job for split in splits for job in _jobs(plan, split, out, settings)]
    own = [] if only_merge else jobs
    if part is not None and not only_merge:
        own = [job for number, job in enumerate(jobs) if number % part.count == part.number]
    with ExitStack() as claimed:
        for split in splits:
            _claim(out / split.name, settings.recorded(split.name), part, claimed)
        outcomes = _run(own, settings.exclusion, workers, show)
        missing = []
        others = [job for job in jobs if job.shard not in outcomes]
        for job, found in zip(others, _look_up(others, workers), strict=True):
            if found is None:
                missing.append(job.shard)
            else:
                outcomes[job.shard] = found
        if missing and only_merge:
            names = ", ".join(str(shard) for shard in missing[:5])
            raise DataError(
                f"{len(missing)} of {len(jobs)} shards are missing or of other input ({names}...). Run the jobs that "
                "build them (--slice) to their end first, with the same flags."
            )
        if missing:
            return missing
        manifests = {}
        for split in splits:
            folder = out / split.name
            manifests[split.name] = _publish(folder, split, [j for j in jobs if j.folder == folder], outcomes, settings)
        for name, content in (extra_files or {}).items():
            with writing(out / name):
                publish_bytes(out / name, content)
    return manifests


def _jobs(plan: Plan, split: PlannedSplit, out: Path, settings: Settings) -> Iterator[Job]:
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


def _claim(folder: Path, settings: dict[str, Any], part: Slice | None, claimed: ExitStack) -> None:
    """Take a folder for this build; one with other settings, or another build of the same shards, is refused."""
    state = folder / STATE_FOLDER
    if is_remote(folder):
        # A store has no locks; two builds at once write the same bytes there.
        _check_settings(folder, settings)
        return
    # Jobs of an array share the folder, but not with a build of all shards, and no two have the same slice.
    claimed.callback(os.close, claim_folder(state, shared=part is not None))
    if part is not None:
        name = f".slice-{part.number}-of-{part.count}.lock"
        claimed.callback(os.close, claim_folder(state, name=name))
    _check_settings(folder, settings)
    if part is None:
        for leftover in (*folder.glob(".*.tmp"), *state.glob(".*.tmp")):  # of a build that was killed
            leftover.unlink(missing_ok=True)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    known = folder / STATE_FOLDER / "settings.json"
    with explain_read_errors(known):
        is_known = known.exists()
        before = json.loads(known.read_bytes()) if is_known else {}
        is_foreign = (folder / MANIFEST_NAME).exists() or any(folder.glob("*.tar"))
    if is_known:
        changed = [f"{n}: {before.get(n)} -> {settings[n]}" for n in settings if before.get(n) != settings[n]]
        if changed:
            raise ConfigError(
                f"{folder} holds a build with other settings ({'; '.join(changed)}). Use another --out, or delete it."
            )
    elif is_foreign:
        raise ConfigError(f"{folder} already holds shards that this program did not build. Use another --out.")
    else:
        with writing(known):
            publish_bytes(known, json.dumps(settings, indent=1).encode())


def _run(jobs: Sequence[Job], exclusion: Exclusion, workers: int, show: Show) -> dict[Path, Outcome]:
    board = _Board(jobs, show)
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            board.finish(job, build_shard(job, exclusion, board.note))
        return board.outcomes
    # A clean server process forks the workers: no threads of this one are copied.
    context = multiprocessing.get_context("forkserver")
    notes: multiprocessing.Queue[Progress] = context.Queue()
    others = set(multiprocessing.active_children())
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
                "A worker process died, most likely for want of memory. Run the command again with fewer --workers: "
                "finished shards are kept."
            ) from None
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # it may be minutes from the end of its shard
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return board.outcomes


class _Board:
    """Adds up what the workers report."""

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
    """What a worker process is given once: how to tell what it has done, and which images to drop."""

    note: Note
    exclusion: Exclusion


def _start_worker(notes: multiprocessing.Queue[Progress], exclusion: Exclusion) -> None:
    """Runs in a new worker: one whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one answers
    notes.cancel_join_thread()
    _Worker.note, _Worker.exclusion = staticmethod(notes.put), exclusion
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _build(job: Job) -> Outcome:
    return build_shard(job, _Worker.exclusion, _Worker.note)


def _look_up(jobs: Sequence[Job], workers: int) -> list[Outcome | None]:
    """What other jobs have finished."""
    with ThreadPoolExecutor(max(1, workers)) as threads:
        return list(threads.map(lambda job: finished(job, input_digest(job), check_content=False), jobs))


def _publish(
    folder: Path, split: PlannedSplit, jobs: Sequence[Job], outcomes: Mapping[Path, Outcome], settings: Settings
) -> Manifest:
    own = [outcomes[job.shard] for job in jobs]
    recorded = settings.recorded(split.name)
    manifest = Manifest(
        source=recorded.pop("source"),
        split=recorded.pop("split"),
        settings=recorded,
        attribution=settings.attribution,
        totals=add_up([outcome.totals for outcome in own], split.rejects),
        shards=tuple(outcome.entry for outcome in own if outcome.entry.samples),
    )
    assert manifest.totals.rows == split.rows, (manifest.totals, split)
    with writing(folder / MANIFEST_NAME):
        _remove_beyond(folder, len(own))
        publish_bytes(folder / SHEET_NAME, contact_sheet(folder, manifest, settings.seed))
        write_manifest(folder, manifest)
    return manifest


def add_up(parts: Sequence[Totals], source_rejects: Mapping[str, int]) -> Totals:
    """The totals of a corpus from those of its shards and what the source itself dropped."""
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


def _remove_beyond(folder: Path, num_shards: int) -> None:
    """Delete shards of an earlier build of the same settings from more input."""
    for shard in folder.glob("[0-9]" * 5 + ".tar"):
        if int(shard.stem) >= num_shards:
            shard.unlink()
            index_path(shard).unlink(missing_ok=True)


def num_cores() -> int:
    """Cores that this process may use: a Slurm job has a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
