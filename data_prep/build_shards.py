"""Builds checked webdataset shards from raw images and captions.

python data_prep/build_shards.py emoji --out=shards/emoji
python data_prep/build_shards.py folder --raw=photos --captions=photos.csv --out=shards/photos
python data_prep/build_shards.py cc3m --raw=/data/cc3m --out=s3://bucket/shards/cc3m
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
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
from data_prep.build import Settings, Slice, build_corpus, count_cores
from data_prep.exclusion import Exclusion, load_exclusion
from data_prep.plan import make_plan
from data_prep.progress import ProgressLine
from data_prep.record import ImagePolicy, SourceOptions

_FLAGS = {
    "raw": "folder with the images and texts as their owner published them",
    "out": "folder for the shards (required): a path, or a URL such as s3://bucket/folder; --raw can be a URL, too",
    "workers": "number of processes (default: all cores); the shards do not depend on it",
    "samples_per_shard": "images per shard (default: depends on the source)",
    "short_side_px": "scale longer short sides down to this, 0: never (default: depends on the source)",
    "jpeg_quality": "quality of re-encoded images, 1 to 100 (default 95)",
    "keep_original": "store every image file that is plain RGB or gray as it is",
    "seed": "seed of the order of the images (default 0)",
    "exclude": "folders of other shards, separated by commas: drop the images that they hold",
    "exclude_distance": "bits of 64 in which the perceptual hashes of equal images may differ (default 4)",
    "slice": "NUMBER/COUNT: build only this fraction of the shards, as one of COUNT jobs",
    "merge": "build nothing; write the manifest of the shards that the slices built",
    "scratch": "folder for the plan (default: the shards' folder, or the system's temporary folder for a remote --out)",
    "progress_seconds": "seconds between progress lines where there is no terminal (default 10)",
}


def _load_sources() -> dict[str, ModuleType]:
    """Import every module of data_prep/sources: a new file there is a new corpus, with no list to edit."""
    names = [module.name for module in pkgutil.iter_modules(data_prep.sources.__path__)]
    return {name: importlib.import_module(f"data_prep.sources.{name}") for name in sorted(names)}


def _make_usage(modules: Mapping[str, ModuleType]) -> str:
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    lines = []
    for name, module in modules.items():
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
    slice: str = "",  # shadows the builtin: the parameter's name is the flag's
    merge: str = "false",
    scratch: str = "",
    progress_seconds: str = "10",
    **source_flags: str,
) -> None:
    """Build the shards of a source."""
    module = _choose_source(source, unexpected, source_flags)
    if not out:
        raise ConfigError("Where to? Give --out=DIR, the folder for the shards.")
    options = SourceOptions(raw=to_path(raw) if raw else None, flags=source_flags)
    settings = Settings(
        source=source,
        attribution=module.ATTRIBUTION,
        images=_parse_images(module.IMAGES, short_side_px, jpeg_quality, parse_bool("keep_original", keep_original)),
        samples_per_shard=parse_whole("samples_per_shard", samples_per_shard or str(module.SAMPLES_PER_SHARD), 1),
        seed=parse_whole("seed", seed, 0),
        keep_repeats=module.KEEP_REPEATS,
        exclusion=_parse_exclusion(exclude, exclude_distance),
    )
    only_slice, only_merge = _parse_slice(slice), parse_bool("merge", merge)
    if only_slice is not None and only_merge:
        raise ConfigError(f"--slice={slice} and --merge contradict each other: give one.")
    num_workers = parse_whole("workers", workers or str(count_cores()), 0)
    folder = to_path(out)
    with (
        ProgressLine(source, parse_whole("progress_seconds", progress_seconds, 0)) as progress,
        make_plan(
            module.records(options),
            seed=settings.seed,
            scratch=_choose_scratch(folder, scratch),
            on_progress=progress.show_rows,
        ) as plan,
    ):
        result = build_corpus(
            plan,
            folder,
            settings,
            workers=num_workers,
            only_slice=only_slice,
            only_merge=only_merge,
            extra_files=module.extra_files(options) if hasattr(module, "extra_files") else None,
            show=progress.show,
        )
    _report(result, folder, source, raw)


def _choose_source(source: str, unexpected: Sequence[str], source_flags: Mapping[str, str]) -> ModuleType:
    """Return the module of a source.

    Raises:
        ConfigError: there is no such source, or it does not read one of the flags.
    """
    modules = _load_sources()
    known_flags = {flag for module in modules.values() for flag in module.FLAGS}
    unknown = {name: value for name, value in source_flags.items() if name not in known_flags}
    usage = _make_usage(modules)
    refuse_unknown(unexpected, unknown, [*_FLAGS, *sorted(known_flags)], usage)
    if not source:
        raise ConfigError(f"Which source? {usage}")
    if source not in modules:
        raise ConfigError(unknown_name("source", source, modules))
    for flag, value in source_flags.items():
        if flag not in modules[source].FLAGS:
            readers = ", ".join(name for name, module in modules.items() if flag in module.FLAGS)
            raise ConfigError(f"The source {source} does not read --{flag}={value}. Sources that do: {readers}.")
    return modules[source]


def _parse_images(default: ImagePolicy, short_side_px: str, jpeg_quality: str, keep_original: bool) -> ImagePolicy:
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


def _parse_exclusion(exclude: str, distance: str) -> Exclusion:
    folders = [name for name in exclude.split(",") if name]
    return load_exclusion(folders, parse_whole("exclude_distance", distance, 0))


def _parse_slice(text: str) -> Slice | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--slice={text} is not NUMBER/COUNT with NUMBER < COUNT, such as 0/16 for the first of 16.")
    return Slice(int(match[1]), int(match[2]))


def _choose_scratch(out: Path, scratch: str) -> Path | None:
    """Return the folder for the plan; None: the system's temporary folder, which is memory on some machines."""
    return Path(scratch) if scratch else None if is_remote(out) else out


def _report(result: Mapping[str, Manifest] | Sequence[Path], folder: Path, source: str, raw: str) -> None:
    """Print what was built.

    Raises:
        DataError: not one image could be used.
    """
    if not isinstance(result, Mapping):
        print(
            f"This slice is done; {len(result)} shards of other slices are missing. The job that finishes last writes "
            "the manifest; if none did, run the same command with --merge instead of --slice."
        )
        return
    _print_table(folder, result)
    if not any(manifest.shards for manifest in result.values()):
        raise DataError(
            f"No image of {source} could be used; the table lists the reasons. Is --raw={raw} the folder that the "
            "source describes (--help)?"
        )


def _print_table(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """Print one row per split, as in the paper's Table 9, and below it why texts were rejected."""
    table = Table("split", title=f"Shards in {out}", title_justify="left")
    for name in ("images", "captions", "words per caption", "MB", "shards", "rejected"):
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
            name = f" in {split}" if split else ""
            console.print(f"Rejected captions{name}: {reasons}", soft_wrap=True, markup=False)


def _run() -> None:
    try:
        run_command(lambda: fire.Fire(SetParseFn(str)(main)))
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: finished shards are kept.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    _run()
