"""Speed of the training stream, of webdataset's plain pipeline and of open_clip's, on the same shards in one run.

python benchmarks/data_stream.py [--images=256] [--rounds=24] [--seconds=1] [--batches=20000] [--out=FILE.json]

The photographs are scikit-image's, cut to the sizes of the corpora and stored as they are, so that each pair costs a
decoding and a resize to 288 px. Captions have 12 tokens, the mean of the four corpora. All sides stay alive and take
short turns, in one order and then in the other, so that other load on the machine slows all of them. The medians of the
rounds and of their ratios count. All files are in the page cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import numpy as np
import psutil
import torch
from fire.decorators import SetParseFn
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_features, cpu_model
from benchmarks.photos import cut_photos
from benchmarks.stream_sides import LIMIT, OURS, SIDE_PX, SIDES, our_stream
from bridgetower.config.cli import parse_whole, refuse_unknown, run_command
from bridgetower.config.snapshot import find_commit
from bridgetower.data.loader import micro_batches
from bridgetower.data.order import Order
from bridgetower.errors import ConfigError
from bridgetower.shards.index import IndexRow, encode_index, make_index
from bridgetower.shards.manifest import Manifest, ShardEntry, Totals, write_manifest

_FLAGS = {
    "images": "number of photographs of each size (default 256)",
    "rounds": "number of turns of this stream and of decoding alone; other sides have a fourth (default 24)",
    "seconds": "length of each turn (default 1)",
    "batches": "number of batches of the memory measurement (default 20000)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/data_stream.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
_SIZES = {"500x375": (500, 375), "640x480": (640, 480)}
_WORKERS = (1, 2)
# The slower pipelines take part in every fourth round: they are several times slower, while this stream and decoding
# alone differ by a few percent.
_OTHERS_EVERY = 4
_REPO = Path(__file__).resolve().parent.parent
# Size of the four corpora: 9 million pairs in 400 shards.
_SHARDS, _PAIRS_PER_SHARD, _GLOBAL_BATCH = 400, 22_500, 4_096


def main(
    *unexpected: str,
    images: str = "256",
    rounds: str = "24",
    seconds: str = "1",
    batches: str = "20000",
    out: str = "",
    **unknown: str,
) -> None:
    """Measure and print tables."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    count, turns = parse_whole("images", images, 64), parse_whole("rounds", rounds, 1)
    duration, num_batches = parse_whole("seconds", seconds, 1), parse_whole("batches", batches, 100)
    results: dict[str, Any] = {"rates": {}, "rounds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in _SIZES.items():
            shards = _build(Path(folder) / name, size, count)
            for workers in _WORKERS:
                case = f"{name}, {workers} worker(s)"
                results["rounds"][case] = _take_turns(shards, workers, turns, duration)
                results["rates"][case] = rates = _medians(results["rounds"][case])
                _print_rates(f"{name} to {SIDE_PX} px, {workers} worker(s)", rates)
        results["memory"] = _memory(_build(Path(folder) / "small", (48, 48), count), num_batches)
        results["far_start"] = _far_start(Path(folder) / "large")
    results["shuffle"] = _shuffle()
    if out:
        machine = {
            "machine": cpu_model(),
            "cpu_features": cpu_features(),
            "cores": len(psutil.Process().cpu_affinity()),
        }
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
        content = {**results, **machine, **versions, "commit": find_commit()}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def _build(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Build shards of photographs with data_prep/build_shards.py, and return their folder."""
    (folder / "raw").mkdir(parents=True)
    lines = ["image,caption"]
    for index, raw in enumerate(cut_photos(size, count)):
        (folder / "raw" / f"{index:05d}.jpg").write_bytes(raw)
        lines.append(f"{index:05d}.jpg,a photograph of a thing with the number {index}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "data_prep/build_shards.py", "folder", f"--raw={folder / 'raw'}", "--keep_original"]
    command += [
        f"--captions={folder / 'captions.csv'}",
        f"--out={folder / 'shards'}",
        f"--samples_per_shard={count // 4}",
    ]
    subprocess.run(command, cwd=_REPO, check=True, capture_output=True)
    return folder / "shards"


class _Side:
    """A side that waits for its turns, in one process or in several."""

    def __init__(self, name: str, shards: Path, workers: int) -> None:
        # Decoding alone is one process without workers. As many of them as other sides have workers share the machine's
        # memory bandwidth as those do.
        self._name = name
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.stream_sides", name, str(shards), str(workers)]
        self._processes = [
            subprocess.Popen(
                command,
                cwd=_REPO,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for _ in range(workers if name == LIMIT else 1)
        ]
        for process in self._processes:
            self._line(process)  # says that the side is ready

    def turn(self, seconds: int) -> dict[str, float]:
        """Let the side work, and return its rates."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        answers = [json.loads(self._line(process)) for process in self._processes]
        return {
            "pairs_per_second": sum(answer["pairs"] / answer["seconds"] for answer in answers),
            "pairs_per_core_second": statistics.mean(answer["pairs"] / answer["busy_seconds"] for answer in answers),
        }

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise ConfigError(f"The side {self._name!r} does not run:\n{process.stderr.read()[-2000:]}")
        return line

    def close(self) -> None:
        """End the side's processes and their workers."""
        for process in self._processes:
            try:
                process.communicate(timeout=20)  # a side ends with its input
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _take_turns(shards: Path, workers: int, turns: int, seconds: int) -> list[dict[str, dict[str, float]]]:
    """Return the rates of each round, by side and name."""
    rounds: list[dict[str, dict[str, float]]] = []
    with contextlib.ExitStack() as living:
        sides = {}
        for name in SIDES:
            sides[name] = _Side(name, shards, workers)
            living.callback(sides[name].close)
        for turn in range(turns):
            names = [name for name in SIDES if name in (LIMIT, OURS) or turn % _OTHERS_EVERY == 0]
            rates = {name: sides[name].turn(seconds) for name in names[:: -1 if turn % 2 else 1]}
            for rate in rates.values():
                rate["this_stream_is"] = rates[OURS]["pairs_per_core_second"] / rate["pairs_per_core_second"]
            rounds.append(rates)
    return rounds


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        side: {name: statistics.median(rates[side][name] for rates in rounds if side in rates) for name in figures}
        for side, figures in rounds[0].items()
    }


def _print_rates(title: str, rates: dict[str, dict[str, float]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("", "pairs/s per core", "pairs/s", "this stream is (per core)"):
        table.add_column(name, justify="right" if name else "left")
    for side, rate in rates.items():
        ratio = "" if side == OURS else f"{rate['this_stream_is']:.2f} x"
        table.add_row(side, f"{rate['pairs_per_core_second']:,.0f}", f"{rate['pairs_per_second']:,.0f}", ratio)
    Console().print(table)


def _memory(shards: Path, num_batches: int) -> dict[str, dict[str, float]]:
    """Return the private memory of the rank and of its workers, early in a run and at its end."""
    sizes_after: dict[str, dict[str, float]] = {}
    batches = micro_batches(our_stream(shards, 2, batch=4, side_px=32), 0, num_batches)
    own = psutil.Process()
    for num_taken, _ in enumerate(batches, 1):
        if num_taken in (num_batches // 10, num_batches):
            # A fork server, which has imported what the workers need, stands between the rank and its workers.
            workers = [worker for server in own.children() for worker in server.children()]
            sizes_after[f"after {num_taken:,} batches"] = {
                "rank_mb": own.memory_full_info().uss / 1e6,
                "workers_mb": sum(worker.memory_full_info().uss for worker in workers) / 1e6,
                "workers": len(workers),
            }
    print("\nMemory of the rank and its workers (not shared with others):")
    for when, sizes in sizes_after.items():
        print(f"  {when}: rank {sizes['rank_mb']:.0f} MB, {sizes['workers']} workers {sizes['workers_mb']:.0f} MB")
    return sizes_after


def _far_start(folder: Path) -> dict[str, float]:
    """Time opening the indexes of nine million pairs of four million images, and finding the pairs of step 90,000."""
    folder.mkdir()
    random = np.random.default_rng(0)
    entries = []
    for shard_index in range(_SHARDS):
        captions = random.permutation(np.repeat([2, 3, 1], [5_000, 3_750, 1_250]))  # 22,500 of 10,000 images
        rows = [IndexRow(512 + 40_960 * row, 38_000, 38_400, 500, row, count) for row, count in enumerate(captions)]
        (folder / f"{shard_index:05d}.index.npy").write_bytes(encode_index(make_index(rows)))
        with (folder / f"{shard_index:05d}.tar").open("wb") as tar:
            tar.truncate(40_960 * 10_001)  # a sparse file
        size = 40_960 * 10_001
        name = f"{shard_index:05d}.tar"
        entries.append(
            ShardEntry(name=name, samples=10_000, pairs=_PAIRS_PER_SHARD, bytes=size, sha256=f"{shard_index:064d}")
        )
    totals = Totals(
        rows=_SHARDS * _PAIRS_PER_SHARD,
        images_in=_SHARDS * 10_000,
        images=_SHARDS * 10_000,
        captions=_SHARDS * _PAIRS_PER_SHARD,
        bytes=0,
        caption_words=0,
        rejects={},
        image_rejects={},
    )
    manifest = Manifest(source="none", split="", settings={}, attribution="", totals=totals, shards=tuple(entries))
    write_manifest(folder, manifest)
    own = psutil.Process()
    before, start = own.memory_full_info().uss, time.perf_counter()
    stream = our_stream(folder, 0)
    located = stream.order.locate(90_000 * _GLOBAL_BATCH + np.arange(_GLOBAL_BATCH))
    for shard, pair in zip(located.shard.tolist(), located.pair.tolist(), strict=True):
        stream.corpora.read_image_id(shard, pair)
    figures = {
        "seconds": time.perf_counter() - start,
        "private_mb": (own.memory_full_info().uss - before) / 1e6,
        "indexes_mb": sum(file.stat().st_size for file in folder.glob("*.npy")) / 1e6,
    }
    print(
        f"\nThe {_GLOBAL_BATCH:,} pairs of step 90,000 of a run over 9,000,000 pairs of 4,000,000 images are found in "
        f"{figures['seconds']:.2f} s, with {figures['private_mb']:.1f} MB of private memory; the indexes, which all "
        f"processes of a node share, take {figures['indexes_mb']:.0f} MB."
    )
    return figures


def _shuffle() -> dict[str, float]:
    """Return how far apart neighbours of a shard land, for this stream and for a full permutation of the epoch."""
    pairs = 250  # per shard instead of 22,500, so that all positions can be computed
    order = Order([pairs] * _SHARDS, [0] * _SHARDS, seed=0, shards_per_window=64)
    located = order.locate(np.arange(order.num_pairs))
    position = np.empty((_SHARDS, pairs), np.int64)
    position[located.shard, located.pair] = np.arange(order.num_pairs)
    apart = np.abs(np.diff(position, axis=1)) / order.num_pairs
    large = Order([_PAIRS_PER_SHARD] * _SHARDS, [0] * _SHARDS, seed=0, shards_per_window=64)
    batch = large.locate(np.arange(_GLOBAL_BATCH)).shard
    figures = {
        "mean_distance": float(apart.mean()),
        "full_permutation_mean_distance": 1 / 3,
        "shards_in_a_global_batch": len(np.unique(batch)),
        "full_permutation_shards_in_a_global_batch": _SHARDS * (1 - (1 - 1 / _SHARDS) ** _GLOBAL_BATCH),
    }
    print(
        f"\nShuffling {_SHARDS} shards of {_PAIRS_PER_SHARD:,} pairs in windows of 64: neighbours of a shard land "
        f"{figures['mean_distance']:.3f} of an epoch apart on average (a full permutation: 0.333); a global batch of "
        f"{_GLOBAL_BATCH:,} holds pairs of {figures['shards_in_a_global_batch']:.0f} shards (a full permutation: "
        f"{figures['full_permutation_shards_in_a_global_batch']:.0f})."
    )
    return figures


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
