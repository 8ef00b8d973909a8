"""From raw pictures and captions to checked webdataset shards.

python data_prep/build_shards.py emoji --out=shards/emoji
python data_prep/build_shards.py folder --raw=photos --captions=photos.csv --out=shards/photos
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import fire
from fire.decorators import SetParseFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import data_prep.sources
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.config.overrides import unknown_name
from bridgetower.data.manifest import Manifest
from bridgetower.errors import ConfigError
from data_prep.record import SourceOptions
from data_prep.shard_writer import build_corpus

_FLAGS = {
    "raw": "folder with the images, or the files as their owner published them",
    "captions": "caption file (source folder: CSV or JSONL)",
    "out": "folder for the shards (required)",
    "workers": "processes (default: all cores); the result does not depend on them",
    "samples_per_shard": "images of a shard (default: by source)",
    "short_side_px": "scale longer short sides down to this, 0 never (default: by source)",
    "jpeg_quality": "of re-encoded images (default 95)",
    "keep_original": "store every image file that is plain RGB or gray as it is",
    "seed": "of the order of the images (default 0)",
}
_PLAIN_PROGRESS_SECONDS = 10.0


def _sources() -> dict[str, ModuleType]:
    """Every module of data_prep/sources: adding a corpus is adding a file."""
    names = [module.name for module in pkgutil.iter_modules(data_prep.sources.__path__)]
    return {name: importlib.import_module(f"data_prep.sources.{name}") for name in sorted(names)}


def _usage() -> str:
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    sources = "\n".join(f"  {name:8} {(module.__doc__ or '').splitlines()[0]}" for name, module in _sources().items())
    return f"Usage: python data_prep/build_shards.py SOURCE --out=DIR [flags]\n\nSources:\n{sources}\n\nFlags:\n{flags}"


def main(
    source: str = "",
    *unexpected: str,
    raw: str = "",
    captions: str = "",
    out: str = "",
    workers: str = "",
    samples_per_shard: str = "",
    short_side_px: str = "",
    jpeg_quality: str = "",
    keep_original: str = "false",
    seed: str = "0",
    **unknown: str,
) -> None:
    """Build the shards of a source."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _usage())
    sources = _sources()
    if not source:
        raise ConfigError(f"Which source? {_usage()}")
    if source not in sources:
        raise ConfigError(unknown_name("source", source, sources))
    if not out:
        raise ConfigError("Where to? Give --out=DIR, the folder for the shards.")
    module = sources[source]
    for flag, value in (("raw", raw), ("captions", captions)):
        if value and flag not in module.FLAGS:
            raise ConfigError(f"The source {source} does not read --{flag}={value}: it brings its own data.")
    images = module.IMAGES
    if parse_bool("keep_original", keep_original):
        if short_side_px:
            raise ConfigError("--keep_original and --short_side_px contradict each other: give one.")
        images = replace(images, short_side_px=0)
    if short_side_px:
        images = replace(images, short_side_px=parse_whole("short_side_px", short_side_px, 0))
    if jpeg_quality:
        quality = parse_whole("jpeg_quality", jpeg_quality, 1)
        if quality > 100:
            raise ConfigError(f"--jpeg_quality={quality} must be at most 100.")
        images = replace(images, jpeg_quality=quality)
    options = SourceOptions(raw=Path(raw) if raw else None, captions=Path(captions) if captions else None)
    with _ProgressLine(source) as progress:
        manifests = build_corpus(
            module.records(options),
            Path(out),
            source=source,
            attribution=module.ATTRIBUTION,
            images=images,
            samples_per_shard=parse_whole("samples_per_shard", samples_per_shard or str(module.SAMPLES_PER_SHARD), 1),
            seed=parse_whole("seed", seed, 0),
            workers=parse_whole("workers", workers or str(os.cpu_count() or 1), 0),
            on_progress=progress.show,
        )
    _print_table(Path(out), manifests)


class _ProgressLine:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._start = self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, rate="")

    def __enter__(self) -> _ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int, images: int) -> None:
        now = time.monotonic()
        rate = f"{images / max(now - self._start, 1e-9):.0f} images/s"
        self._bar.update(self._task, completed=done, total=total, rate=rate)
        if not self._console.is_terminal and now - self._last > _PLAIN_PROGRESS_SECONDS:
            self._last = now
            print(f"{self._title}: {done} of {total} shards, {rate}", file=sys.stderr, flush=True)


def _print_table(out: Path, manifests: dict[str, Manifest]) -> None:
    """A row per split, as in the paper's Table 9, and where every rejected record went."""
    table = Table("folder", title=f"Shards in {out}", title_justify="left")
    for name in ("images", "captions", "words a caption", "MB", "shards", "rejected"):
        table.add_column(name, justify="right")
    for split, manifest in manifests.items():
        totals = manifest.totals
        table.add_row(
            str(out / split),
            f"{totals.images:,}",
            f"{totals.captions:,}",
            f"{totals.caption_words / max(totals.captions, 1):.1f}",
            f"{totals.bytes / 1e6:.1f}",
            f"{len(manifest.shards):,}",
            "; ".join(f"{count} {reason}" for reason, count in totals.rejects.items()) or "0",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
