"""What CC3M, CC12M and SBU share: captions beside URLs, and three ways in which people keep the pictures.

Which of them a folder has is seen from its picture folders or tars; pictures that were never downloaded are records
all the same, so that the build counts them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors, is_remote
from bridgetower.shards.sample import safe_key
from data_prep.img2dataset_output import downloaded_records
from data_prep.raw_files import DiskDict, delimited_rows, json_items, raw_folder, require_files
from data_prep.record import ImageFile, Record, Reject, SourceOptions

TARS_FOLDER = "webdataset"
"""Where fetch_corpus.py lets img2dataset write, below --raw."""
# Two files of the same row: the first of these counts.
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", "")
_LETTERS_OF_FOLDER = 4  # of ViLT's picture folders


class Row(NamedTuple):
    """A row of the list that the owner of a corpus publishes."""

    caption: str
    url: str
    """Empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A split, and where it is in BridgeTower's and in ViLT's layout."""

    split: str
    table: str
    """The file of captions and URLs."""
    pictures: str
    """Folder of its pictures in BridgeTower's layout."""
    list_file: str
    """ViLT's list of pictures with captions."""
    list_pictures: str


@dataclass(frozen=True, kw_only=True)
class WebCorpus:
    """A corpus that is published as captions with URLs."""

    name: str
    parts: tuple[Part, ...]
    rows: Callable[[Path], Iterator[Row]]
    """Reads a table."""
    is_named_by_row: bool
    """BridgeTower's pictures are named by their row in the table; otherwise as in their URL."""


def caption_url_rows(file: Path) -> Iterator[Row]:
    """CC3M's table: caption, tab, URL. A further tab belongs to the caption.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    for _, cells in delimited_rows(file, delimiter="\t"):
        yield Row(" ".join(cells[:-1]), cells[-1]) if len(cells) > 1 else Row("".join(cells), "")


def url_caption_rows(file: Path) -> Iterator[Row]:
    """CC12M's table: URL, tab, caption. A further tab belongs to the caption.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    for _, cells in delimited_rows(file, delimiter="\t"):
        yield Row(" ".join(cells[1:]), cells[0] if cells else "")


def column_rows(file: Path) -> Iterator[Row]:
    """SBU's JSON of columns, read twice at the same time, as captions and URLs stand far from each other.

    Raises:
        DataError: the file is not such a JSON, or its columns differ in length.
    """
    number = -1
    try:
        columns = zip(json_items(file, "image_urls.item"), json_items(file, "captions.item"), strict=True)
        for number, (url, caption) in enumerate(columns):
            if not isinstance(url, str) or not isinstance(caption, str):
                raise DataError(
                    f"{file}: row {number} has image_urls={url!r} and captions={caption!r}; both are texts."
                )
            yield Row(caption, url)
    except ValueError as error:
        raise DataError(
            f"{file}: image_urls and captions differ in length after row {number} ({error}). Download it again."
        ) from error
    if number < 0:
        raise DataError(f"{file} has no rows: it needs the arrays image_urls and captions. Download it again.")


def web_records(options: SourceOptions, corpus: WebCorpus) -> Iterator[Record | Reject]:
    """The records of a corpus in whichever of the three layouts it is there.

    Raises:
        ConfigError: --raw is missing.
        DataError: there is none of the layouts or more than one, or a file is not as described.
    """
    raw = raw_folder(options, corpus.name, "the pictures in one of three layouts, see --help")
    found = _layouts(raw, corpus)
    if not found:
        raise DataError(
            f"--raw={raw} has none of the layouts of {corpus.name}:\n{_described(corpus)}\n"
            f"`python data_prep/fetch_corpus.py {corpus.name} --out={raw}` says how to get it."
        )
    if len(found) > 1:
        raise DataError(
            f"--raw={raw} holds {corpus.name} more than once: {' and '.join(found)}. Each of them would be a corpus of "
            "its own; point --raw at a folder with one of them."
        )
    (read,) = found.values()
    yield from read()


def _layouts(raw: Path, corpus: WebCorpus) -> dict[str, Callable[[], Iterator[Record | Reject]]]:
    """What is there, in words for people, and how to read it."""
    found: dict[str, Callable[[], Iterator[Record | Reject]]] = {}
    with explain_read_errors(raw):
        own = [part for part in corpus.parts if (raw / part.pictures).is_dir()]
        listed = [part for part in corpus.parts if (raw / part.list_pictures).is_dir()]
        if own:
            found[f"BridgeTower's layout ({own[0].pictures}/)"] = partial(_table_records, raw, corpus, own)
        if listed:
            found[f"ViLT's layout ({listed[0].list_pictures}/)"] = partial(_list_records, raw, corpus, listed)
        for base in (raw, raw / TARS_FOLDER):
            if _has_tars(base):
                found[f"img2dataset's tars in {base}"] = partial(downloaded_records, base, corpus.parts[0].split)
            folders = {part.split: base / part.split for part in corpus.parts if part.split}
            folders = {split: folder for split, folder in folders.items() if _has_tars(folder)}
            if folders:
                found[f"img2dataset's tars in {base}/{{{','.join(folders)}}}"] = partial(_split_tars, folders)
    return found


def _described(corpus: WebCorpus) -> str:
    first = corpus.parts[0]
    pictures = "<row>.jpg" if corpus.is_named_by_row else "<last part of the URL>"
    splits = [part.split for part in corpus.parts if part.split]
    tars = f"*.tar, or {TARS_FOLDER}/*.tar" + "".join(f", or {TARS_FOLDER}/{split}/*.tar" for split in splits)
    return (
        f"  BridgeTower's:  {first.table} and {first.pictures}/{pictures}\n"
        f"  ViLT's:         {first.list_file} and {first.list_pictures}/<first 4 letters>/<name>\n"
        f"  img2dataset's:  {tars}"
    )


def _has_tars(folder: Path) -> bool:
    return folder.is_dir() and next(iter(folder.glob("*.tar")), None) is not None


def _split_tars(folders: dict[str, Path]) -> Iterator[Record | Reject]:
    for split, folder in folders.items():
        yield from downloaded_records(folder, split)


def _table_records(raw: Path, corpus: WebCorpus, parts: list[Part]) -> Iterator[Record | Reject]:
    """BridgeTower's layout. Keys are numbers of rows: names from URLs repeat, and no row may replace another."""
    files = require_files(raw, [part.table for part in parts], corpus.name)
    for part, file in zip(parts, files, strict=True):
        folder = raw / part.pictures
        named = _by_row if corpus.is_named_by_row else _by_url
        for number, (row, name) in enumerate(named(corpus.rows(file), folder)):
            if not name:
                yield Reject(reason="URL without a file name", split=part.split)
                continue
            yield Record(
                key=f"{number:08d}",
                image=ImageFile(path=folder / name),
                image_id="",
                captions=(row.caption,),
                split=part.split,
                meta={"url": row.url} if row.url else {},
            )


def _by_url(rows: Iterator[Row], folder: Path) -> Iterator[tuple[Row, str]]:
    """Each row with the name of its picture; rows whose URLs end alike have the same one."""
    for row in rows:
        name = row.url.rsplit("/", 1)[-1]
        yield row, "" if name in (".", "..") or "\0" in name else name


def _by_row(rows: Iterator[Row], folder: Path) -> Iterator[tuple[Row, str]]:
    """Each row with the name of its picture. The folder is listed once: to ask for each of millions takes longer."""
    with DiskDict() as suffixes:
        for name in _names(folder):
            stem, dot, suffix = name.partition(".")
            suffix = f"{dot}{suffix}"
            if not (stem.isascii() and stem.isdecimal()) or suffix.lower() not in _PICTURE_SUFFIXES:
                continue
            # Rows are named without leading zeros, but not by everybody: the name itself is kept.
            other = suffixes.get(int(stem))
            if other is None or _rank(name) < _rank(other):
                suffixes[int(stem)] = name
        for number, row in enumerate(rows):
            yield row, suffixes.get(number, f"{number}.jpg")


def _rank(name: str) -> tuple[int, str]:
    return _PICTURE_SUFFIXES.index(PurePosixPath(name).suffix.lower()), name


def _names(folder: Path) -> Iterator[str]:
    """The names in a folder, one at a time where that is possible: Path.iterdir makes a list of all of them."""
    with explain_read_errors(folder):
        if is_remote(folder):
            for path in folder.iterdir():
                yield path.name
        else:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield entry.name


def _list_records(raw: Path, corpus: WebCorpus, parts: list[Part]) -> Iterator[Record]:
    """ViLT's layout. The folder of a picture is the first four letters of its name, whatever path the list gives."""
    files = require_files(raw, [part.list_file for part in parts], corpus.name)
    for part, file in zip(parts, files, strict=True):
        number = -1
        for number, entry in enumerate(json_items(file, "item")):
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)):
                raise DataError(f"{file}: entry {number} is {str(entry)[:80]!r}; each one is [path, caption].")
            path, caption = entry
            name = path.rsplit("/", 1)[-1]
            if name in ("", ".", "..") or "\0" in name:
                raise DataError(f"{file}: entry {number} has the path {path!r}, which does not name a file.")
            yield Record(
                key=safe_key(name),
                image=ImageFile(path=raw / part.list_pictures / name[:_LETTERS_OF_FOLDER] / name),
                image_id="",
                captions=(caption,),
                split=part.split,
            )
        if number < 0:
            raise DataError(f"{file} is not a list of [path, caption], or is empty. Make it again.")
