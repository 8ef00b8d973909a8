"""What a corpus consists of and where it comes from, and the download of it.

python data_prep/fetch_corpus.py coco --out=/data/coco
python data_prep/fetch_corpus.py coco --out=/data/coco --download
python data_prep/fetch_corpus.py cc3m --out=/data/cc3m --download --images
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fire
from fire.decorators import SetParseFn
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command, show_usage_or_stop
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import EXIT_INTERRUPTED, ConfigError
from bridgetower.io.files import claim_folder, write_atomically
from bridgetower.io.storage import is_remote, to_path
from data_prep.catalogue import Corpus, RemoteFile, catalogue, tars_folder
from data_prep.http_files import download_file, http_session
from data_prep.img2dataset_output import Downloads
from data_prep.raw_files import require_files
from data_prep.unpack import unpack
from data_prep.url_pictures import INSTALL, download_pictures, find_img2dataset
from data_prep.web_corpora import WebCorpus

_FLAGS = {
    "out": "folder for the files (required), --raw of build_shards.py",
    "download": "download and unpack; without it, the files are only listed",
    "images": "download the pictures of a list of URLs with img2dataset (cc3m, cc12m, sbu)",
    "processes": "of img2dataset (default: all cores)",
    "max_rows": "only so many rows of a list of URLs (default: all), to try it out",
    "img2dataset": "the program, if it is not on the PATH",
    "mirror": "take https://host/path from PREFIX/host/path",
}
_ARCHIVES = "downloads"
_UNPACKED = ".unpacked.json"


def _usage() -> str:
    flags = "\n".join(f"  --{name:11}  {meaning}" for name, meaning in _FLAGS.items())
    return (
        "Usage: python data_prep/fetch_corpus.py SOURCE --out=DIR [--download] [--images] [flags]\n\n"
        f"Sources: {', '.join(catalogue())}\n\nFlags:\n{flags}\n\n"
        "Stopped with Ctrl-C and run again, it goes on where it was."
    )


def main(
    source: str = "",
    *unexpected: str,
    out: str = "",
    download: str = "false",
    images: str = "false",
    processes: str = "",
    max_rows: str = "0",
    img2dataset: str = "",
    mirror: str = "",
    **unknown: str,
) -> None:
    """List the files of a corpus, or fetch them."""
    if not source:
        show_usage_or_stop("source", unknown, _usage())
    refuse_unknown(unexpected, unknown, list(_FLAGS), _usage())
    corpora = catalogue()
    if source not in corpora:
        raise ConfigError(unknown_name("source", source, corpora))
    corpus = corpora[source]
    if not out:
        raise ConfigError("Where to? Give --out=DIR, the folder for the files.")
    folder = to_path(out)
    if is_remote(folder):
        raise ConfigError(f"--out={out} is not on this machine: archives are unpacked, which takes a local folder.")
    num_processes = parse_whole("processes", processes or str(os.cpu_count() or 1), 1)
    num_rows = parse_whole("max_rows", max_rows, 0)
    wants_files, wants_images = parse_bool("download", download), parse_bool("images", images)
    if mirror and urlsplit(mirror).scheme not in ("http", "https"):
        raise ConfigError(f"--mirror={mirror} must begin with http:// or https://.")
    if wants_images and corpus.urls is None:
        readers = ", ".join(name for name, other in corpora.items() if other.urls is not None)
        raise ConfigError(f"The pictures of {source} come with --download. --images is for {readers}.")
    program = find_img2dataset(img2dataset) if wants_images else ""
    if not (wants_files or wants_images):
        _list(source, corpus, folder)
        return
    lock = claim_folder(folder, name=".fetch.lock")
    try:
        if wants_files:
            _fetch(corpus, folder, mirror.rstrip("/"))
        if wants_images:
            assert corpus.urls is not None
            _fetch_pictures(corpus.urls, folder, program, num_processes, num_rows)
        _say_what_is_left(source, corpus, folder)
    finally:
        os.close(lock)


def _list(source: str, corpus: Corpus, folder: Path) -> None:
    table = Table("file", "from", "size", "checksum", title=f"{source}, below {folder}", title_justify="left")
    for file in corpus.files:
        size = "unknown" if file.size_bytes is None else f"{file.size_bytes:,} bytes"
        table.add_row(file.path, file.url, size, f"MD5 {file.md5}" if file.md5 else "checksum unknown")
    for request in corpus.by_hand:
        table.add_row(request.what, "on request, see below", "unknown", "checksum unknown")
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    for request in corpus.by_hand:
        print(f"\n{request.what}: {request.how}")
    print("\nTo get it:" if corpus.files else "\nNothing of it can be downloaded here.")
    command = f"  python data_prep/fetch_corpus.py {source} --out={folder}"
    if corpus.files:
        print(f"{command} --download")
    if corpus.urls is not None:
        print(f"{command} --images   # the pictures, days for all of them; needs img2dataset:\n  {INSTALL}")
    print(f"Then:\n  python data_prep/build_shards.py {source} --raw={folder} --out=shards/{source}")


def _fetch(corpus: Corpus, folder: Path, mirror: str) -> None:
    session = http_session()
    with _Bar() as bar:
        for file in corpus.files:
            address = _address(file.url, mirror)
            name = Path(urlsplit(file.url).path).name
            if not file.unpack_into:
                target = folder / file.path
                with bar.showing(f"download {target.name}") as show:
                    download_file(session, address, target, size_bytes=file.size_bytes, md5=file.md5, show=show)
                continue
            if file.url in _unpacked(folder):
                continue
            archive = folder / _ARCHIVES / name
            with bar.showing(f"download {name}") as show:
                download_file(session, address, archive, size_bytes=file.size_bytes, md5=file.md5, show=show)
            with bar.showing(f"unpack {name}") as show:
                num_files = unpack(archive, folder / file.unpack_into, show)
            _note_unpacked(folder, file, num_files)


def _address(url: str, mirror: str) -> str:
    return f"{mirror}/{url.partition('://')[2]}" if mirror else url


def _unpacked(folder: Path) -> dict[str, int]:
    """Which archives are unpacked, by URL: they may be deleted then, and are not downloaded again."""
    notes = folder / _ARCHIVES / _UNPACKED
    try:
        found: dict[str, int] = json.loads(notes.read_bytes()) if notes.is_file() else {}
    except ValueError:  # somebody has edited it
        return {}
    return found


def _note_unpacked(folder: Path, file: RemoteFile, num_files: int) -> None:
    notes = {**_unpacked(folder), file.url: num_files}
    write_atomically(folder / _ARCHIVES / _UNPACKED, json.dumps(notes, indent=1).encode())


def _fetch_pictures(corpus: WebCorpus, folder: Path, program: str, processes: int, max_rows: int) -> None:
    tables = require_files(folder, [part.table for part in corpus.parts], corpus.name)
    results: dict[str, Downloads] = {}
    for part, table in zip(corpus.parts, tables, strict=True):
        target = folder / tars_folder(part.split)
        results[part.split] = download_pictures(
            program, corpus.rows(table), target, processes=processes, max_rows=max_rows
        )
    _print_links(results)


def _print_links(results: Mapping[str, Downloads]) -> None:
    table = Table("split", title="Pictures from their URLs", title_justify="left")
    for name in ("rows", "downloaded", "dead links"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for split, result in results.items():
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in result.failures.most_common())
        dead = result.rows - result.pictures
        table.add_row(split or "all", f"{result.rows:,}", f"{result.pictures:,}", f"{dead:,}", reasons)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _say_what_is_left(source: str, corpus: Corpus, folder: Path) -> None:
    for request in corpus.by_hand:
        print(f"Still to be had by hand: {request.what}. {request.how}")
    if corpus.urls is not None and not (folder / tars_folder(corpus.urls.parts[0].split)).is_dir():
        print("The pictures are not there yet: run the command with --images.")
    elif not corpus.by_hand:
        print(f"Done. Next: python data_prep/build_shards.py {source} --raw={folder} --out=shards/{source}")
    if (folder / _ARCHIVES).is_dir():
        print(f"The archives in {folder / _ARCHIVES} are unpacked and may be deleted, but for {_UNPACKED}.")


class _Bar:
    """A progress bar on a terminal, and a line per file elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def showing(self, title: str) -> Iterator[_Show]:
        if not self._console.is_terminal:
            print(title, file=sys.stderr, flush=True)
        yield _Show(self._progress, self._progress.add_task(title, total=None))


class _Show:
    """Moves one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, there: int, total: int | None) -> None:
        self._progress.update(self._task, completed=there, total=total)


def _run() -> None:
    # Slurm ends a job with this; img2dataset and its processes have to be ended, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(lambda: fire.Fire(SetParseFn(str)(main)))
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: it goes on.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    _run()
