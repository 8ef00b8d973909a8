"""From raw pictures and captions to checked webdataset shards.

python data_prep/build_shards.py emoji --out=shards/emoji
python data_prep/build_shards.py folder --raw=photos --captions=photos.csv --out=shards/photos
python data_prep/build_shards.py cc3m --raw=/data/cc3m --out=s3://bucket/shards/cc3m
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import fire
from fire.decorators import SetParseFn
from rich.console import Console
from rich.table import Table

import data_prep.sources
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import EXIT_INTERRUPTED, ConfigError, DataError
from bridgetower.io.storage import is_remote, to_path
from bridgetower.shards.manifest import Manifest
from data_prep.build import Settings, Slice, build_corpus, num_cores
from data_prep.exclusion import load_exclusion
from data_prep.plan import planning
from data_prep.progress import ProgressLine
from data_prep.record import ImagePolicy, SourceOptions

_FLAGS = {
    "raw": "folder with the images and texts as their owner published them",
    "out": "folder for the shards (required); a path, or a URL such as s3://bucket/folder, as --raw can be",
    "workers": "processes (default: all cores); the result does not depend on them",
    "samples_per_shard": "images of a shard (default: by source)",
    "short_side_px": "scale longer short sides down to this, 0 never (default: by source)",
    "jpeg_quality": "of re-encoded images (default 95)",
    "keep_original": "store every image file that is plain RGB or gray as it is",
    "seed": "of the order of the images (default 0)",
    "exclude": "folders of other shards, separated by commas: drop the images that are in them",
    "exclude_distance": "bits of 64 in which the perceptual hashes of equal pictures may differ (default 4)",
    "slice": "NUMBER/COUNT: build only that part of the shards, as one of COUNT jobs",
    "merge": "build nothing, write the manifest of what the slices built",
    "scratch": "folder for the plan (default: beside the shards, or the system's for temporary files)",
    "progress_seconds": "between lines of progress where there is no terminal (default 10)",
}


def _sources() -> dict[str, ModuleType]:
    """Every module of data_prep/sources: adding a corpus is adding a file."""
    names = [module.name for module in pkgutil.iter_modules(data_prep.sources.__path__)]
    return {name: importlib.import_module(f"data_prep.sources.{name}") for name in sorted(names)}


def _usage() -> str:
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    lines = []
    for name, module in _sources().items():
        lines.append(f"  {name:15} {(module.__doc__ or '').splitlines()[0]}")
        lines += [f"  {'':15}   --{flag}  {meaning}" for flag, meaning in module.FLAGS.items()]
    sources = "\n".join(lines)
    return f"Usage: python data_prep/build_shards.py SOURCE --out=DIR [flags]\n\nSources:\n{sources}\n\nFlags:\n{flags}"


def main(
    source: str = "",
    *unexpected: str,
    raw: str = "",
    out: str = "",
    workers: str = "",
    samples_per_shard: str = "",
    short_side_px: str = "",
    jpeg_quality: str = "",
    keep_original: str = "false",
    seed: str = "0",
    exclude: str = "",
    exclude_distance: str = "4",
    slice: str = "",  # the flag's name
    merge: str = "false",
    scratch: str = "",
    progress_seconds: str = "10",
    **own: str,
) -> None:
    """Build the shards of a source."""
    sources = _sources()
    flags_of_sources = {flag for module in sources.values() for flag in module.FLAGS}
    unknown = {name: value for name, value in own.items() if name not in flags_of_sources}
    refuse_unknown(unexpected, unknown, [*_FLAGS, *sorted(flags_of_sources)], _usage())
    if not source:
        raise ConfigError(f"Which source? {_usage()}")
    if source not in sources:
        raise ConfigError(unknown_name("source", source, sources))
    module = sources[source]
    for flag, value in own.items():
        if flag not in module.FLAGS:
            readers = ", ".join(name for name, other in sources.items() if flag in other.FLAGS)
            raise ConfigError(f"The source {source} does not read --{flag}={value}; {readers} does.")
    if not out:
        raise ConfigError("Where to? Give --out=DIR, the folder for the shards.")
    options = SourceOptions(raw=to_path(raw) if raw else None, flags=own)
    settings = Settings(
        source=source,
        attribution=module.ATTRIBUTION,
        images=_policy(module.IMAGES, short_side_px, jpeg_quality, parse_bool("keep_original", keep_original)),
        samples_per_shard=parse_whole("samples_per_shard", samples_per_shard or str(module.SAMPLES_PER_SHARD), 1),
        seed=parse_whole("seed", seed, 0),
        keep_repeats=module.KEEP_REPEATS,
        exclusion=load_exclusion(
            [name for name in exclude.split(",") if name], parse_whole("exclude_distance", exclude_distance, 0)
        ),
    )
    part, only_merge = _slice(slice), parse_bool("merge", merge)
    if part is not None and only_merge:
        raise ConfigError(f"--slice={slice} and --merge contradict each other: give one.")
    num_workers = parse_whole("workers", workers or str(num_cores()), 0)
    folder = to_path(out)
    room = _scratch(folder, scratch)
    with (
        ProgressLine(source, parse_whole("progress_seconds", progress_seconds, 0)) as progress,
        planning(module.records(options), seed=settings.seed, scratch=room, on_progress=progress.planned) as plan,
    ):
        result = build_corpus(
            plan,
            folder,
            settings,
            workers=num_workers,
            part=part,
            only_merge=only_merge,
            extra_files=module.extra_files(options) if hasattr(module, "extra_files") else None,
            show=progress.show,
        )
    if isinstance(result, list):
        print(
            f"This slice is done; {len(result)} shards of other slices are not. The last job writes the manifest; if "
            "none did, run the same command with --merge instead of --slice."
        )
    else:
        _print_table(folder, result)
        if not any(manifest.shards for manifest in result.values()):
            raise DataError(
                f"No image of {source} could be used; the table says why. Is --raw={raw} the folder that the source "
                "describes (--help)?"
            )


def _policy(default: ImagePolicy, short_side_px: str, jpeg_quality: str, keep_original: bool) -> ImagePolicy:
    images = default
    if keep_original:
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
    return images


def _slice(text: str) -> Slice | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--slice={text} is not NUMBER/COUNT with NUMBER < COUNT, such as 0/16 for the first of 16.")
    return Slice(int(match[1]), int(match[2]))


def _scratch(out: Path, scratch: str) -> Path | None:
    """Beside the shards there is room; the folder of temporary files is memory on some machines."""
    return Path(scratch) if scratch else None if is_remote(out) else out


def _print_table(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """A row per split, as in the paper's Table 9, and below why texts were rejected."""
    table = Table("split", title=f"Shards in {out}", title_justify="left")
    for name in ("images", "captions", "words a caption", "MB", "shards", "rejected"):
        table.add_column(name, justify="right")
    for split, manifest in manifests.items():
        totals = manifest.totals
        table.add_row(
            split or "all",
            f"{totals.images:,}",
            f"{totals.captions:,}",
            f"{totals.caption_words / max(totals.captions, 1):.1f}",
            f"{totals.bytes / 1e6:.1f}",
            f"{len(manifest.shards):,}",
            f"{sum(totals.rejects.values()):,}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for split, manifest in manifests.items():
        rejects = sorted(manifest.totals.rejects.items(), key=lambda item: (-item[1], item[0]))
        if rejects:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in rejects)
            name = f" of {split}" if split else ""
            console.print(f"Rejected captions{name}: {reasons}", soft_wrap=True, markup=False)


def _run() -> None:
    try:
        run_command(lambda: fire.Fire(SetParseFn(str)(main)))
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: finished shards are kept.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    _run()
