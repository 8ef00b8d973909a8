"""Writes the manifest and row indexes of webdataset tars that another tool wrote: img2dataset, LAION, DataComp.

python data_prep/index_shards.py DIR [--source=NAME] [--decode=true] [--workers=N]

A sample needs an image and a json with ``caption`` (or ``captions``). Samples without them, and those whose image
cannot be decoded, are left out of the index and counted by reason. The tars themselves are not changed.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn
from rich.console import Console

from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import sha256_of
from bridgetower.io.storage import explain_read_errors, publish_bytes
from bridgetower.shards.index import (
    Index,
    IndexRow,
    encode_index,
    index_path,
    iterate_samples,
    make_index,
    make_index_row,
)
from bridgetower.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, Totals, write_manifest
from bridgetower.shards.sample import IMAGE_SUFFIXES, parse_record
from data_prep.build import add_totals, count_cores
from data_prep.convert import Rejected, convert
from data_prep.local import copy_locally, map_shards, require_shard_folder
from data_prep.record import ImagePolicy
from data_prep.shard_writer import STATE_FOLDER, explain_write_errors

_FLAGS = {
    "source": "name of the corpus in the manifest (default: name of the folder)",
    "decode": "decode every image, to leave out damaged ones (default true)",
    "workers": "number of processes (default: all cores)",
}
_USAGE = "Usage: python data_prep/index_shards.py DIR [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
INDEXED = "indexed"
"""Setting in the manifest by which check_shards.py recognises tars of other tools."""
_KEEP_SIZE = ImagePolicy(short_side_px=0)


def main(
    folder: str = "",
    *unexpected: str,
    source: str = "",
    decode: str = "true",
    workers: str = "",
    **unknown: str,
) -> None:
    """Index the tars of a folder."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    path = require_shard_folder(folder, _USAGE)
    with explain_read_errors(path):
        shards = sorted(path.glob("*.tar"))
        if (path / STATE_FOLDER).is_dir():
            raise ConfigError(
                f"{path} was built by build_shards.py, which writes manifest and indexes itself. Run it again, or run "
                f"`python data_prep/check_shards.py {path} --repair`."
            )
    if not shards:
        raise DataError(f"{path} has no *.tar files to index. Give the folder of the tars.")
    must_decode = parse_bool("decode", decode)
    results = map_shards(
        "indexing",
        _index,
        [(shard, must_decode) for shard in shards],
        parse_whole("workers", workers or str(count_cores()), 1),
    )
    manifest = Manifest(
        source=source or path.name,
        split="",
        settings={INDEXED: "tars of others", "decode": must_decode},
        attribution="",
        totals=add_totals([totals for _, totals in results], {}),
        shards=tuple(entry for entry, _ in results if entry.samples),
    )
    with explain_write_errors(path / MANIFEST_NAME):
        write_manifest(path, manifest)
    totals = manifest.totals
    rejected = "; ".join(f"{count:,} {reason}" for reason, count in totals.image_rejects.items()) or "none"
    Console().print(
        f"{path / MANIFEST_NAME}: {totals.images:,} images in {len(manifest.shards):,} shards; left out: {rejected}",
        highlight=False,
        soft_wrap=True,
    )


def _index(shard: Path, decode: bool) -> tuple[ShardEntry, Totals]:
    """Write the index of one tar; runs in a worker process."""
    with copy_locally(shard) as local:
        index, totals = scan_foreign_tar(local, shard.name, decode=decode)
        entry = ShardEntry(
            name=shard.name,
            samples=len(index),
            pairs=int(index["num_captions"].sum()),
            bytes=local.stat().st_size,
            sha256=sha256_of(local),
        )
    with explain_write_errors(index_path(shard)):
        publish_bytes(index_path(shard), encode_index(index))
    return entry, totals


def scan_foreign_tar(shard: Path, name: str, *, decode: bool) -> tuple[Index, Totals]:
    """Make the row index of a tar that another tool wrote, without the samples that cannot be used.

    Args:
        name: names the tar in errors.
        decode: also leave out the images that cannot be decoded.

    Returns: the index, and the totals of the tar.

    Raises:
        DataError: the tar itself is damaged.
    """
    rows: list[IndexRow] = []
    rejects: Counter[str] = Counter()
    num_samples = words = captions = 0
    with shard.open("rb") as file:

        def read_content(member: tarfile.TarInfo) -> bytes:
            file.seek(member.offset_data)
            return file.read(member.size)

        for key, members in iterate_samples(shard, name):
            num_samples += 1
            try:
                image, record = _find_members(members)
                content = _parse_record(read_content(record), f"{name}:{key}")
                if decode:
                    convert(read_content(image), _KEEP_SIZE, f"{name}:{key}")
            except Rejected as reason:
                rejects[str(reason)] += 1
                continue
            rows.append(make_index_row(image, record, content))
            captions += len(content["captions"])
            words += sum(len(caption.split()) for caption in content["captions"])
    totals = Totals(
        rows=captions + rejects.total(),
        images_in=num_samples,
        images=len(rows),
        captions=captions,
        bytes=shard.stat().st_size,
        caption_words=words,
        rejects=dict(sorted(rejects.items())),
        image_rejects=dict(sorted(rejects.items())),
    )
    return make_index(rows), totals


def _find_members(members: dict[str, tarfile.TarInfo]) -> tuple[tarfile.TarInfo, tarfile.TarInfo]:
    """Return the image and the json of a sample.

    Raises:
        Rejected: it does not have exactly one image, or has no json.
    """
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise Rejected("no image" if not images else "more than one image")
    if "json" not in members:
        raise Rejected("no json")
    return members[images[0]], members["json"]


def _parse_record(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_record(raw, where)
    except DataError:
        raise Rejected("no caption, or no name of the image, in the json") from None


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
