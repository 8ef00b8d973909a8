"""Makes manifest and row indexes for webdataset tars that others built: img2dataset, LAION, DataComp.

python data_prep/index_shards.py DIR [--source=NAME] [--decode=true] [--workers=N]

A sample needs an image and a json with ``caption`` (or ``captions``). Samples without, and images that cannot be
decoded, are left out of the index, counted by reason. The tars themselves are not touched.
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
from data_prep.build import add_up, num_cores
from data_prep.convert import Rejected, convert
from data_prep.local import each_shard, local_copy, shard_folder
from data_prep.record import ImagePolicy
from data_prep.shard_writer import STATE_FOLDER, writing

_FLAGS = {
    "source": "name of the corpus in the manifest (default: that of the folder)",
    "decode": "decode each image, to leave out damaged ones (default true)",
    "workers": "processes (default: all cores)",
}
_USAGE = "Usage: python data_prep/index_shards.py DIR [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
INDEXED = "indexed"
"""A setting in the manifest of such a folder, by which check_shards.py knows it."""
_AS_THEY_ARE = ImagePolicy(short_side_px=0)


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
    place = shard_folder(folder, _USAGE)
    with explain_read_errors(place):
        shards = sorted(place.glob("*.tar"))
        if (place / STATE_FOLDER).is_dir():
            raise ConfigError(
                f"{place} was built by build_shards.py, which makes manifest and indexes itself. Run it again, or "
                f"`python data_prep/check_shards.py {place} --repair`."
            )
    if not shards:
        raise DataError(f"{place} has no *.tar files to index.")
    checked = parse_bool("decode", decode)
    found = each_shard(
        "indexing",
        _index,
        [(shard, checked) for shard in shards],
        parse_whole("workers", workers or str(num_cores()), 1),
    )
    manifest = Manifest(
        source=source or place.name,
        split="",
        settings={INDEXED: "tars of others", "decode": checked},
        attribution="",
        totals=add_up([totals for _, totals in found], {}),
        shards=tuple(entry for entry, _ in found if entry.samples),
    )
    with writing(place / MANIFEST_NAME):
        write_manifest(place, manifest)
    totals = manifest.totals
    rejected = "; ".join(f"{count:,} {reason}" for reason, count in totals.image_rejects.items()) or "none"
    Console().print(
        f"{place / MANIFEST_NAME}: {totals.images:,} images in {len(manifest.shards):,} shards; left out: {rejected}",
        highlight=False,
        soft_wrap=True,
    )


def _index(shard: Path, decode: bool) -> tuple[ShardEntry, Totals]:
    """Write the index of one tar; runs in a worker."""
    with local_copy(shard) as local:
        index, totals = scan_foreign(local, shard.name, decode=decode)
        entry = ShardEntry(
            name=shard.name,
            samples=len(index),
            pairs=int(index["num_captions"].sum()),
            bytes=local.stat().st_size,
            sha256=sha256_of(local),
        )
    with writing(index_path(shard)):
        publish_bytes(index_path(shard), encode_index(index))
    return entry, totals


def scan_foreign(shard: Path, name: str, *, decode: bool) -> tuple[Index, Totals]:
    """The row index of a tar of another tool, without the samples that cannot be used.

    Args:
        name: what errors call the tar.
        decode: leave out images that cannot be decoded, too.

    Raises:
        DataError: the tar itself is damaged.
    """
    rows: list[IndexRow] = []
    rejects: Counter[str] = Counter()
    num_samples = words = num_bytes = captions = 0
    with shard.open("rb") as file:

        def content_of(member: tarfile.TarInfo) -> bytes:
            file.seek(member.offset_data)
            return file.read(member.size)

        for key, members in iterate_samples(shard, name):
            num_samples += 1
            try:
                image, record = _members(members)
                content = _record(content_of(record), f"{name}:{key}")
                if decode:
                    convert(content_of(image), _AS_THEY_ARE, f"{name}:{key}")
            except Rejected as reason:
                rejects[str(reason)] += 1
                continue
            rows.append(make_index_row(image, record, content))
            captions += len(content["captions"])
            words += sum(len(caption.split()) for caption in content["captions"])
            num_bytes += image.size + record.size
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


def _members(members: dict[str, tarfile.TarInfo]) -> tuple[tarfile.TarInfo, tarfile.TarInfo]:
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise Rejected("no image" if not images else "more than one image")
    if "json" not in members:
        raise Rejected("no json")
    return members[images[0]], members["json"]


def _record(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_record(raw, where)
    except DataError:
        raise Rejected("no caption, or no name of the image, in the json") from None


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
