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
from bridgetower.io.storage import as_remote, patiently, place, publish_bytes, read_whole, reading
from bridgetower.shards.index import index_path

MANIFEST_NAME = "shards.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    samples: int
    pairs: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The row of the corpus in a table like the paper's Table 9, and where every input row went."""

    rows: int
    """Input texts (captions, questions): rows = captions + the sum of rejects."""
    images_in: int
    """Input images: images_in = images + the sum of image_rejects."""
    images: int
    captions: int
    bytes: int
    caption_words: int
    """Words of all captions, white-space separated; divided by captions this is the mean caption length."""
    rejects: dict[str, int]
    """Texts that did not become a caption, by reason."""
    image_rejects: dict[str, int]
    """Images that did not become a sample, by reason."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus folder holds."""

    source: str
    split: str
    settings: dict[str, Any]
    """What the shards were built with: the same settings on the same input give the same bytes."""
    attribution: str
    totals: Totals
    shards: tuple[ShardEntry, ...]

    @property
    def num_pairs(self) -> int:
        """Captions of all shards."""
        return sum(shard.pairs for shard in self.shards)

    def digest(self) -> str:
        """SHA-256 of the shards' names, sizes and checksums: two corpora with the same digest hold the same pairs."""
        lines = [f"{s.name} {s.samples} {s.pairs} {s.bytes} {s.sha256}\n" for s in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a manifest: it appears whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    publish_bytes(folder / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a corpus folder, and that its files are there with their right sizes.

    Raises:
        DataError: no such folder, no manifest, an unknown version, or a shard that is missing or of another size.
    """
    folder = place(folder)
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(read_whole(path))
    except (FileNotFoundError, NotADirectoryError):
        _check_there(folder)
        inner = sorted(child.parent.name for child in folder.glob(f"*/{MANIFEST_NAME}"))
        hint = (
            f"Its splits are folders of their own: {', '.join(str(folder / name) for name in inner)}."
            if inner
            else "A build that was interrupted leaves none: run the same build_shards.py command again, it goes on."
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
        # Clients of object stores have error classes of their own.
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


def _check_there(folder: Path) -> None:
    """Only asked once the manifest is not there: clients of stores take one that does not answer for no folder."""
    with reading(folder):
        # A web server has no folders that could be asked for.
        if _is_of_web_server(folder) or folder.is_dir():
            return
    raise DataError(
        f"The shard folder {folder} does not exist. Build it with "
        f"`python data_prep/build_shards.py SOURCE --raw=DIR --out={folder}`, or correct data.train_shards "
        "or data.eval_shards."
    )


def _is_of_web_server(folder: Path) -> bool:
    remote = as_remote(folder)
    return remote is not None and remote.protocol in ("http", "https")


def _sizes_of(folder: Path) -> dict[str, int] | None:
    """Bytes of each file of a folder, in one question to an object store; None where there is nobody to ask."""
    remote = as_remote(folder)
    if remote is None:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    if _is_of_web_server(folder):
        return None
    with reading(folder):
        found = patiently(lambda: remote.fs.find(remote.path, maxdepth=1, detail=True), folder)
    return {name.rpartition("/")[2]: int(info["size"]) for name, info in found.items()}


def _check_files(shard: Path, num_bytes: int, sizes: Mapping[str, int]) -> None:
    cure = "Copy it again, or run the build_shards.py command again: it rebuilds what is missing."
    found = sizes.get(shard.name)
    if found is None:
        raise DataError(f"The shard {shard} is in the manifest but not on disk. {cure}")
    if found != num_bytes:
        raise DataError(f"The shard {shard} has {found:,} bytes, its manifest says {num_bytes:,}. {cure}")
    if index_path(shard).name not in sizes:
        raise DataError(f"The shard {shard} has no row index {index_path(shard).name}. {cure}")
