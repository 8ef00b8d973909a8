"""Checks finished shards: names, checksums, counts, members, json, images, and duplicates between corpora.

python data_prep/check_shards.py DIR [DIR ...] [--decode=all|none|N] [--duplicates=error|report] [--repair]

Prints what is wrong and ends with exit code 2 if anything is. ``--repair`` writes indexes and manifests anew, moves
shards that cannot be trusted into DIR/quarantine, and checks again; build_shards.py, run again, then makes the missing
shards.

In tars of other tools that index_shards.py has indexed, only the samples in the index are checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import fire
from fire.decorators import SetParseFn
from rich.console import Console

from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.errors import EXIT_USAGE, ConfigError
from data_prep.build import count_cores
from data_prep.corpus_checks import CheckedCorpus, check_corpus, find_shared_images
from data_prep.local import require_shard_folder
from data_prep.repair_corpus import repair_corpus
from data_prep.shard_checks import Finding

_FLAGS = {
    "decode": "images to decode in each shard: all, none, or a number of random ones (default 100)",
    "duplicates": "images that several of the corpora hold: error, or report (default error)",
    "repair": "write indexes and manifests anew, and move bad shards to DIR/quarantine",
    "workers": "number of processes (default: all cores)",
}
_USAGE = "Usage: python data_prep/check_shards.py DIR [DIR ...] [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
_MAX_SHOWN = 50


def main(
    *folders: str,
    decode: str = "100",
    duplicates: str = "error",
    repair: str = "false",
    workers: str = "",
    **unknown: str,
) -> None:
    """Check the shards of folders."""
    refuse_unknown((), unknown, list(_FLAGS), _USAGE)
    paths = [require_shard_folder(folder, _USAGE) for folder in folders or [""]]
    if duplicates not in ("error", "report"):
        raise ConfigError(f"--duplicates={duplicates} is neither error nor report.")
    to_decode = {"all": -1, "none": 0}.get(decode)
    if to_decode is None:
        to_decode = parse_whole("decode", decode, 0)
    num_workers = parse_whole("workers", workers or str(count_cores()), 1)
    corpora = [check_corpus(path, to_decode, num_workers) for path in paths]
    shared = list(find_shared_images(corpora))
    console = Console(highlight=False, soft_wrap=True)
    _report(console, corpora, shared)
    broken = [corpus for corpus in corpora if corpus.findings]
    if parse_bool("repair", repair) and broken:
        for corpus in broken:
            console.print(repair_corpus(corpus), markup=False)
        broken = [check_corpus(corpus.folder, to_decode, num_workers) for corpus in broken]
        console.print("After the repair:")
        _report(console, broken, [])
        broken = [corpus for corpus in broken if corpus.findings]
    if broken or (shared and duplicates == "error"):
        sys.exit(EXIT_USAGE)


def _report(console: Console, corpora: Sequence[CheckedCorpus], shared: Sequence[Finding]) -> None:
    for corpus in corpora:
        entries = [shard.entry for shard in corpus.shards if shard.entry is not None]
        console.print(
            f"{corpus.folder}: {len(entries):,} shards, {sum(entry.samples for entry in entries):,} images, "
            f"{sum(entry.pairs for entry in entries):,} captions: {len(corpus.findings) or 'nothing'} wrong",
            markup=False,
        )
    for finding in shared:
        console.print(f"{finding.where}: {finding.what}", markup=False)
    findings = [finding for corpus in corpora for finding in corpus.findings]
    for finding in findings[:_MAX_SHOWN]:
        console.print(f"  {finding.where}: {finding.what}", markup=False)
    if len(findings) > _MAX_SHOWN:
        console.print(f"  ... and {len(findings) - _MAX_SHOWN:,} more")


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
