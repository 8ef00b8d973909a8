"""The manifest of a corpus folder (``shards.json``): the checked list of its shards. Never imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.errors import DataError
from bridgetower.io.storage import as_remote, explain_read_errors, publish_bytes, read_file, retry_read, to_path
from bridgetower.shards.index import index_path

MANIFEST_NAME = "shards.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard's entry in the manifest."""

    name: str
    """File name in the corpus folder: ``00000.tar``."""
    samples: int
    pairs: int
    """Captions of all samples."""
    bytes: int
    sha256: str
    """Of the tar, in hexadecimal. The row index has no checksum: it follows from the tar."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Size of the corpus, as in the paper's Table 9, and what became of every input row."""

    rows: int
    """Number of input texts (captions, questions); equals captions plus the sum of rejects."""
    images_in: int
    """Number of input images; equals images plus the sum of image_rejects."""
    images: int
    captions: int
    bytes: int
    caption_words: int
    """Words of all captions, separated by white space; divided by captions it is the mean caption length."""
    rejects: dict[str, int]
    """Number of texts that did not become a caption, by reason."""
    image_rejects: dict[str, int]
    """Number of images that did not become a sample, by reason."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a corpus folder: where it comes from, how it was built, and its shards."""

    source: str
    split: str
    settings: dict[str, Any]
    """Build settings. The same settings on the same input give the same bytes."""
    attribution: str
    totals: Totals
    shards: tuple[ShardEntry, ...]

    @property
    def num_pairs(self) -> int:
        """Number of captions of all shards."""
        return sum(shard.pairs for shard in self.shards)

    def digest(self) -> str:
        """Return the SHA-256 of the shards' names, sizes and checksums. Equal digests mean the same pairs."""
        lines = [f"{s.name} {s.samples} {s.pairs} {s.bytes} {s.sha256}\n" for s in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a corpus folder. Readers never see half of it."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    publish_bytes(folder / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a corpus folder, and check that every shard exists with the listed size.

    Checksums are not verified here: that would read the whole corpus. On a web server, which cannot list a folder,
    shards are checked when they are read.

    Raises:
        DataError: the folder or the manifest is missing, the version is unknown, or a shard is missing or has the wrong
            size.
    """
    folder = to_path(folder)
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        _check_exists(folder)
        splits = sorted(child.parent.name for child in folder.glob(f"*/{MANIFEST_NAME}"))
        hint = (
            f"Its splits are folders of their own: {', '.join(str(folder / name) for name in splits)}."
            if splits
            else "An interrupted build leaves none: run the same build_shards.py command again, which continues it."
        )
        raise DataError(f"{folder} has no {MANIFEST_NAME}. {hint}") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or type(error).__name__}). Correct its permissions, or copy it "
            "again."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Run the build_shards.py command again.") from error
    except Exception as error:
        if as_remote(folder) is None:
            raise
        # Each store's client has its own error classes.
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). Is the store reachable?") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not a manifest. Run the build_shards.py command again."
        )
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version!r}, this version reads {FORMAT_VERSION}. Build it again.")
    try:
        manifest = Manifest(
            **{
                **content,
                "totals": Totals(**content["totals"]),
                "shards": tuple(ShardEntry(**shard) for shard in content["shards"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a manifest of version {FORMAT_VERSION} ({error}). Build it again.") from error
    sizes = _sizes_of(folder)
    if sizes is not None:
        for shard in manifest.shards:
            _check_files(folder / shard.name, shard.bytes, sizes)
    return manifest


def _check_exists(folder: Path) -> None:
    """Raise DataError unless a folder exists.

    Called only after the manifest was found missing: clients report a store that does not answer as a missing folder.
    """
    with explain_read_errors(folder):
        # A web server has no folders that one could query.
        if _is_on_web_server(folder) or folder.is_dir():
            return
    raise DataError(
        f"The shard folder {folder} does not exist. Build it with "
        f"`python data_prep/build_shards.py SOURCE --raw=DIR --out={folder}`, or correct data.train_shards "
        "or data.eval_shards."
    )


def _is_on_web_server(folder: Path) -> bool:
    remote = as_remote(folder)
    return remote is not None and remote.protocol in ("http", "https")


def _sizes_of(folder: Path) -> dict[str, int] | None:
    """Return the size of each file of a folder, with one request to an object store; None for a web server."""
    remote = as_remote(folder)
    if remote is None:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    if _is_on_web_server(folder):
        return None
    with explain_read_errors(folder):
        files = retry_read(lambda: remote.fs.find(remote.path, maxdepth=1, detail=True), folder)
    return {name.rpartition("/")[2]: int(info["size"]) for name, info in files.items()}


def _check_files(shard: Path, num_bytes: int, sizes: Mapping[str, int]) -> None:
    suggestion = "Copy it again, or run the build_shards.py command again: it rebuilds what is missing."
    size = sizes.get(shard.name)
    if size is None:
        raise DataError(f"The shard {shard} is in the manifest but not on disk. {suggestion}")
    if size != num_bytes:
        raise DataError(f"The shard {shard} has {size:,} bytes, its manifest says {num_bytes:,}. {suggestion}")
    if index_path(shard).name not in sizes:
        raise DataError(f"The shard {shard} has no row index {index_path(shard).name}. {suggestion}")
