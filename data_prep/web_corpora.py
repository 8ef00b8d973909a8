"""Reads CC3M, CC12M and SBU, which are published as captions with URLs, in the three layouts that people keep them in.

The image folders or tars below --raw show which layout it is. Images that were never downloaded become records as well,
so that the build counts them as missing.
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
from data_prep.img2dataset_output import read_downloaded_records
from data_prep.raw_files import DiskDict, read_delimited_rows, read_json_items, require_files, require_raw_folder
from data_prep.record import ImageFile, Record, Reject, SourceOptions

TARS_FOLDER = "webdataset"
"""Folder below --raw into which fetch_corpus.py lets img2dataset write."""
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", "")
"""Suffixes of image files; of two files of the same row, the one with the earlier suffix is used."""
_NUM_FOLDER_LETTERS = 4  # ViLT sorts images into folders by the first letters of their names


class Row(NamedTuple):
    """A row of the list that the owner of a corpus publishes."""

    caption: str
    url: str
    """Empty if the row has none."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The files of one split, in BridgeTower's and in ViLT's layout; all paths are below --raw."""

    split: str
    table: str
    """File with the captions and URLs, as the owner publishes it."""
    image_folder: str
    """Folder of the images in BridgeTower's layout."""
    list_file: str
    """ViLT's list of images with captions."""
    list_image_folder: str
    """Folder of the images in ViLT's layout."""


@dataclass(frozen=True, kw_only=True)
class WebCorpus:
    """A corpus that is published as captions with URLs."""

    name: str
    parts: tuple[Part, ...]
    read_rows: Callable[[Path], Iterator[Row]]
    """Function that reads a table."""
    is_named_by_row: bool
    """True if BridgeTower's image files are named by their row in the table, false if by the end of their URL."""


def read_caption_url_rows(file: Path) -> Iterator[Row]:
    """Read CC3M's table: caption, tab, URL. Any other tab belongs to the caption.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    for _, cells in read_delimited_rows(file, delimiter="\t"):
        yield Row(" ".join(cells[:-1]), cells[-1]) if len(cells) > 1 else Row("".join(cells), "")


def read_url_caption_rows(file: Path) -> Iterator[Row]:
    """Read CC12M's table: URL, tab, caption. Any other tab belongs to the caption.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    for _, cells in read_delimited_rows(file, delimiter="\t"):
        yield Row(" ".join(cells[1:]), cells[0] if cells else "")


def read_column_rows(file: Path) -> Iterator[Row]:
    """Read SBU's JSON of columns.

    URLs and captions are far apart in the file, so it is read twice at the same time, in memory that does not grow.

    Raises:
        DataError: the file is not such a JSON, or its columns differ in length.
    """
    number = -1
    try:
        columns = zip(read_json_items(file, "image_urls.item"), read_json_items(file, "captions.item"), strict=True)
        for number, (url, caption) in enumerate(columns):
            if not isinstance(url, str) or not isinstance(caption, str):
                raise DataError(
                    f"{file}: row {number} has image_urls={url!r} and captions={caption!r}; both have to be texts. "
                    "Download the file again."
                )
            yield Row(caption, url)
    except ValueError as error:
        raise DataError(
            f"{file}: image_urls and captions differ in length after row {number} ({error}). Download the file again."
        ) from error
    if number < 0:
        raise DataError(f"{file} has no rows: it needs the arrays image_urls and captions. Download the file again.")


def read_web_records(options: SourceOptions, corpus: WebCorpus) -> Iterator[Record | Reject]:
    """Read a corpus in whichever of the three layouts --raw has it.

    Raises:
        ConfigError: --raw is missing.
        DataError: there is none of the layouts or more than one, or a file is not as described.
    """
    raw = require_raw_folder(options, corpus.name, "the images in one of three layouts, see --help")
    readers = _find_layouts(raw, corpus)
    if not readers:
        raise DataError(
            f"--raw={raw} has none of the layouts of {corpus.name}:\n{_describe_layouts(corpus)}\n"
            f"`python data_prep/fetch_corpus.py {corpus.name} --out={raw}` says how to get it."
        )
    if len(readers) > 1:
        raise DataError(
            f"--raw={raw} holds {corpus.name} more than once: {' and '.join(readers)}. Point --raw at a folder with "
            "one of them."
        )
    (read,) = readers.values()
    yield from read()


def _find_layouts(raw: Path, corpus: WebCorpus) -> dict[str, Callable[[], Iterator[Record | Reject]]]:
    """Find the layouts that a folder has. Returns: a function that reads each one, by its description for people."""
    readers: dict[str, Callable[[], Iterator[Record | Reject]]] = {}
    with explain_read_errors(raw):
        with_table = [part for part in corpus.parts if (raw / part.image_folder).is_dir()]
        with_list = [part for part in corpus.parts if (raw / part.list_image_folder).is_dir()]
        if with_table:
            name = f"BridgeTower's layout ({with_table[0].image_folder}/)"
            readers[name] = partial(_read_table_layout, raw, corpus, with_table)
        if with_list:
            name = f"ViLT's layout ({with_list[0].list_image_folder}/)"
            readers[name] = partial(_read_list_layout, raw, corpus, with_list)
        for base in (raw, raw / TARS_FOLDER):
            if _has_tars(base):
                split = corpus.parts[0].split
                readers[f"img2dataset's tars in {base}"] = partial(read_downloaded_records, base, split)
            folders = {part.split: base / part.split for part in corpus.parts if part.split}
            folders = {split: folder for split, folder in folders.items() if _has_tars(folder)}
            if folders:
                readers[f"img2dataset's tars in {base}/{{{','.join(folders)}}}"] = partial(_read_split_tars, folders)
    return readers


def _describe_layouts(corpus: WebCorpus) -> str:
    first = corpus.parts[0]
    file_name = "<row>.jpg" if corpus.is_named_by_row else "<last part of the URL>"
    splits = [part.split for part in corpus.parts if part.split]
    tars = f"*.tar, or {TARS_FOLDER}/*.tar" + "".join(f", or {TARS_FOLDER}/{split}/*.tar" for split in splits)
    return (
        f"  BridgeTower's:  {first.table} and {first.image_folder}/{file_name}\n"
        f"  ViLT's:         {first.list_file} and {first.list_image_folder}/<first 4 letters>/<name>\n"
        f"  img2dataset's:  {tars}"
    )


def _has_tars(folder: Path) -> bool:
    return folder.is_dir() and next(iter(folder.glob("*.tar")), None) is not None


def _read_split_tars(folders: dict[str, Path]) -> Iterator[Record | Reject]:
    for split, folder in folders.items():
        yield from read_downloaded_records(folder, split)


def _read_table_layout(raw: Path, corpus: WebCorpus, parts: list[Part]) -> Iterator[Record | Reject]:
    """Read BridgeTower's layout. Keys are row numbers: names from URLs repeat, and no row may replace another."""
    files = require_files(raw, [part.table for part in parts], corpus.name)
    for part, file in zip(parts, files, strict=True):
        folder = raw / part.image_folder
        name_images = _name_by_row if corpus.is_named_by_row else _name_by_url
        for number, (row, name) in enumerate(name_images(corpus.read_rows(file), folder)):
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


def _name_by_url(rows: Iterator[Row], folder: Path) -> Iterator[tuple[Row, str]]:
    """Yield each row with the name of its image file; rows whose URLs have the same last part share one."""
    for row in rows:
        name = row.url.rsplit("/", 1)[-1]
        yield row, "" if name in (".", "..") or "\0" in name else name


def _name_by_row(rows: Iterator[Row], folder: Path) -> Iterator[tuple[Row, str]]:
    """Yield each row with the name of its image file.

    The folder is listed once: to look for each of millions of files with each suffix would take longer.
    """
    with DiskDict() as names:
        for name in _list_names(folder):
            stem, dot, suffix = name.partition(".")
            suffix = f"{dot}{suffix}"
            if not (stem.isascii() and stem.isdecimal()) or suffix.lower() not in _IMAGE_SUFFIXES:
                continue
            # The whole name is kept, since some people write leading zeros.
            other = names.get(int(stem))
            if other is None or _rank(name) < _rank(other):
                names[int(stem)] = name
        for number, row in enumerate(rows):
            yield row, names.get(number, f"{number}.jpg")


def _rank(name: str) -> tuple[int, str]:
    return _IMAGE_SUFFIXES.index(PurePosixPath(name).suffix.lower()), name


def _list_names(folder: Path) -> Iterator[str]:
    """Yield the names in a folder, one at a time where that is possible: Path.iterdir makes a list of all of them."""
    with explain_read_errors(folder):
        if is_remote(folder):
            for path in folder.iterdir():
                yield path.name
        else:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield entry.name


def _read_list_layout(raw: Path, corpus: WebCorpus, parts: list[Part]) -> Iterator[Record]:
    """Read ViLT's layout. An image's folder is the first four letters of its name, whatever path the list gives."""
    files = require_files(raw, [part.list_file for part in parts], corpus.name)
    for part, file in zip(parts, files, strict=True):
        number = -1
        for number, entry in enumerate(read_json_items(file, "item")):
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)):
                raise DataError(
                    f"{file}: entry {number} is {str(entry)[:80]!r}; it has to be [path, caption]. Make the list again."
                )
            path, caption = entry
            name = path.rsplit("/", 1)[-1]
            if name in ("", ".", "..") or "\0" in name:
                raise DataError(
                    f"{file}: entry {number} has the path {path!r}, which does not name a file. Make the list again."
                )
            yield Record(
                key=safe_key(name),
                image=ImageFile(path=raw / part.list_image_folder / name[:_NUM_FOLDER_LETTERS] / name),
                image_id="",
                captions=(caption,),
                split=part.split,
            )
        if number < 0:
            raise DataError(f"{file} is not a list of [path, caption], or is empty. Make the list again.")
