"""Lists the files of a corpus and where they come from, or downloads them.

python data_prep/fetch_corpus.py coco --out=/data/coco
python data_prep/fetch_corpus.py coco --out=/data/coco --download
python data_prep/fetch_corpus.py cc3m --out=/data/cc3m --download --images
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import fire
from fire.decorators import SetParseFn
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
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
from data_prep.catalogue import CATALOGUE, Corpus, RemoteFile, get_tar_folder
from data_prep.http_files import Show, download_file, open_session
from data_prep.img2dataset_output import Downloads
from data_prep.raw_files import require_files
from data_prep.unpack import unpack
from data_prep.url_images import INSTALL, download_images, find_img2dataset
from data_prep.web_corpora import WebCorpus

_FLAGS = {
    "out": "folder for the files (required): --raw of build_shards.py",
    "download": "download and unpack the files; without it, they are only listed",
    "images": "download the images of a list of URLs with img2dataset (cc3m, cc12m, sbu)",
    "processes": "processes of img2dataset (default: all cores)",
    "max_rows": "read only this many rows of a list of URLs, to try it out (default: all)",
    "img2dataset": "path of the program, if it is not on the PATH",
    "mirror": "a URL prefix: download https://host/path from PREFIX/host/path",
}
_ARCHIVES = "downloads"
_UNPACKED = ".unpacked.json"
"""File that lists the archives that are unpacked already, so that they may be deleted."""


def _make_usage() -> str:
    flags = "\n".join(f"  --{name:11}  {meaning}" for name, meaning in _FLAGS.items())
    return (
        "Usage: python data_prep/fetch_corpus.py SOURCE --out=DIR [--download] [--images] [flags]\n\n"
        f"Sources: {', '.join(CATALOGUE)}\n\nFlags:\n{flags}\n\n"
        "After Ctrl-C, the same command continues where it stopped."
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
        show_usage_or_stop("source", unknown, _make_usage())
    refuse_unknown(unexpected, unknown, list(_FLAGS), _make_usage())
    if source not in CATALOGUE:
        raise ConfigError(unknown_name("source", source, CATALOGUE))
    corpus = CATALOGUE[source]
    if not out:
        raise ConfigError("Where to? Give --out=DIR, the folder for the files.")
    folder = to_path(out)
    if is_remote(folder):
        raise ConfigError(f"--out={out} is not on this machine. Archives are unpacked there: give a local folder.")
    num_processes = parse_whole("processes", processes or str(os.cpu_count() or 1), 1)
    num_rows = parse_whole("max_rows", max_rows, 0)
    wants_files, wants_images = parse_bool("download", download), parse_bool("images", images)
    if mirror and urlsplit(mirror).scheme not in ("http", "https"):
        raise ConfigError(f"--mirror={mirror} must begin with http:// or https://.")
    if wants_images and corpus.urls is None:
        names = ", ".join(name for name, other in CATALOGUE.items() if other.urls is not None)
        raise ConfigError(f"The images of {source} come with --download. --images is for {names}.")
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
            _fetch_images(corpus.urls, folder, program, num_processes, num_rows)
        _print_next_step(source, corpus, folder)
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
    print("\nTo download it:" if corpus.files else "\nNone of its files can be downloaded by this program.")
    command = f"  python data_prep/fetch_corpus.py {source} --out={folder}"
    if corpus.files:
        print(f"{command} --download")
    if corpus.urls is not None:
        print(f"{command} --images   # the images: takes days for all of them, and needs img2dataset:\n  {INSTALL}")
    print(f"Then:\n  python data_prep/build_shards.py {source} --raw={folder} --out=shards/{source}")


def _fetch(corpus: Corpus, folder: Path, mirror: str) -> None:
    session = open_session()
    with _Bars() as bars:
        for file in corpus.files:
            address = _apply_mirror(file.url, mirror)
            name = Path(urlsplit(file.url).path).name
            if not file.unpack_into:
                target = folder / file.path
                show = bars.add(f"download {target.name}")
                download_file(session, address, target, size_bytes=file.size_bytes, md5=file.md5, show=show)
                continue
            if file.url in _read_unpacked(folder):
                continue
            archive = folder / _ARCHIVES / name
            show = bars.add(f"download {name}")
            download_file(session, address, archive, size_bytes=file.size_bytes, md5=file.md5, show=show)
            num_files = unpack(archive, folder / file.unpack_into, bars.add(f"unpack {name}"))
            _note_unpacked(folder, file, num_files)


def _apply_mirror(url: str, mirror: str) -> str:
    return f"{mirror}/{url.partition('://')[2]}" if mirror else url


def _read_unpacked(folder: Path) -> dict[str, int]:
    """Return the number of files of each archive that is unpacked, by its URL; such archives are not fetched again."""
    file = folder / _ARCHIVES / _UNPACKED
    try:
        counts: dict[str, int] = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:  # edited by hand: unpacking once more does no harm
        return {}
    return counts


def _note_unpacked(folder: Path, file: RemoteFile, num_files: int) -> None:
    counts = {**_read_unpacked(folder), file.url: num_files}
    write_atomically(folder / _ARCHIVES / _UNPACKED, json.dumps(counts, indent=1).encode())


def _fetch_images(corpus: WebCorpus, folder: Path, program: str, processes: int, max_rows: int) -> None:
    tables = require_files(folder, [part.table for part in corpus.parts], corpus.name)
    results: dict[str, Downloads] = {}
    for part, table in zip(corpus.parts, tables, strict=True):
        target = folder / get_tar_folder(part.split)
        results[part.split] = download_images(
            program, corpus.read_rows(table), target, processes=processes, max_rows=max_rows
        )
    _print_downloads(results)


def _print_downloads(results: Mapping[str, Downloads]) -> None:
    table = Table("split", title="Images from their URLs", title_justify="left")
    for name in ("rows", "downloaded", "dead links"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for split, result in results.items():
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in result.failures.most_common())
        dead = result.rows - result.images
        table.add_row(split or "all", f"{result.rows:,}", f"{result.images:,}", f"{dead:,}", reasons)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_next_step(source: str, corpus: Corpus, folder: Path) -> None:
    for request in corpus.by_hand:
        print(f"Still to be fetched by hand: {request.what}. {request.how}")
    if corpus.urls is not None and not (folder / get_tar_folder(corpus.urls.parts[0].split)).is_dir():
        print("The images are still missing: run the command with --images.")
    elif not corpus.by_hand:
        print(f"Done. Next: python data_prep/build_shards.py {source} --raw={folder} --out=shards/{source}")
    if (folder / _ARCHIVES).is_dir():
        print(f"The archives in {folder / _ARCHIVES} are unpacked and may be deleted; keep {_UNPACKED}.")


class _Bars:
    """Progress bars on a terminal; elsewhere, one printed line per file."""

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

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, title: str) -> Show:
        """Add a bar. Returns: the function that moves it."""
        if not self._console.is_terminal:
            print(title, file=sys.stderr, flush=True)
        task = self._progress.add_task(title, total=None)
        return lambda done_bytes, total_bytes: self._progress.update(task, completed=done_bytes, total=total_bytes)


def _run() -> None:
    # Slurm ends a job with SIGTERM. As an interrupt it reaches the code that ends img2dataset and its processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(lambda: fire.Fire(SetParseFn(str)(main)))
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: it continues.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    _run()
