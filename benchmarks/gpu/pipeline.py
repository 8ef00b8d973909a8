"""The section of benchmarks/gpu that times pretrain/train.py, from JPEGs to weights, on shards that it builds."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.plan import Request, Run
from benchmarks.photos import cut_photos
from benchmarks.step_sides import MEAN_TOKENS, caption_lengths
from bridgetower.cost.published import PUBLISHED_TOKENS
from bridgetower.errors import ConfigError

_REPO = Path(__file__).resolve().parent.parent.parent
# Number of photographs, by whether shapes are small. All are in the page cache after the first epoch.
_NUM_PHOTOS = {False: 512, True: 16}
_PHOTO_SIZE = (640, 480)
_CAPTIONS_PER_PHOTO = 8
_REPORTS = 8  # metrics lines per training run, if it has as many steps
_FEWEST_STEPS = 5
_WORDS = ("a", "photograph", "of", "some", "thing", "that", "stands", "in", "the", "light", "beside", "another", "one")


def measure(request: Request, note: Callable[[dict[str, Any]], None]) -> None:
    """Build the shards, and train over them once for each run of the request."""
    begin, cores = time.perf_counter(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        photographs = _build_shards(folder, _NUM_PHOTOS[request.small])
        for run in request.runs:
            # Stops 5 s before this process is killed, so that what the run has reported by then is kept.
            seconds = request.seconds - (time.perf_counter() - begin) - 5
            measured = _train(request, run, folder, max(1, cores - 2), seconds)
            what = f"train.py, {run.describe()}, {run.micro_batch * run.accumulation_steps:,} pairs per step"
            note({"what": what, "model": request.preset, "photographs": photographs, **measured})


def _build_shards(folder: Path, count: int) -> str:
    """Build shards of photographs with data_prep/build_shards.py, and return a description of the photographs."""
    origin = "cut from scikit-image's"
    try:
        photos = cut_photos(_PHOTO_SIZE, count)
    except (ConfigError, ImportError, OSError) as error:
        origin, photos = f"synthetic, because there are none: {error}", synthetic_photos(_PHOTO_SIZE, count)
    (folder / "raw").mkdir()
    lines = ["image,caption"]
    # Lengths include <s> and </s>; each of the words is one token.
    lengths = iter(caption_lengths(count * _CAPTIONS_PER_PHOTO, MEAN_TOKENS, PUBLISHED_TOKENS))
    for index, raw in enumerate(photos):
        (folder / "raw" / f"{index:05d}.jpg").write_bytes(raw)
        for _ in range(_CAPTIONS_PER_PHOTO):
            lines.append(f"{index:05d}.jpg,{' '.join(_WORDS[n % len(_WORDS)] for n in range(next(lengths) - 2))}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    flags = {"raw": "raw", "captions": "captions.csv", "out": "shards"}
    command = ["data_prep/build_shards.py", "folder", *(f"--{flag}={folder / file}" for flag, file in flags.items())]
    failure = _run([*command, f"--samples_per_shard={max(1, count // 8)}"], folder / "build.log", seconds=300)
    if failure:
        raise RuntimeError(f"The shards of the photographs cannot be built: {failure}")
    return f"{count} of {_PHOTO_SIZE[0]}x{_PHOTO_SIZE[1]}, {origin}"


def synthetic_photos(size: tuple[int, int], count: int, *, seed: int = 0) -> list[bytes]:
    """Return JPEGs of quality 90 with about as many bytes per pixel as photographs, for machines without scikit-image.

    Args:
        size: width and height.
    """
    random = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        summed = np.full((size[1], size[0], 3), 128.0)
        for cells in (4, 16, 64, 256):
            noise = random.integers(0, 256, (cells * size[1] // size[0], cells, 3), np.uint8)
            coarse = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
            summed += (
                (np.asarray(coarse, np.float64) - 128) * 2 / cells**0.5
            )  # finer structures are weaker, as in photographs
        stream = io.BytesIO()
        Image.fromarray(summed.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        photos.append(stream.getvalue())
    return photos


def _train(request: Request, run: Run, folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Run pretrain/train.py and read its metrics; the run is killed after its last report, before it saves gigabytes.

    Raises:
        RuntimeError: the run ended before its second report.
    """
    settings = training_settings(request, run, folder, workers)
    command = ["pretrain/train.py", request.preset, *(f"--{name}={value}" for name, value in settings.items())]
    file = folder / "runs" / settings["name"] / "metrics.jsonl"

    def reports() -> list[dict[str, Any]]:
        # The last line may be incomplete while it is being written.
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [line for line in map(json.loads, lines) if "speed/pairs_per_second" in line]

    num_reports = int(settings["optim.total_steps"]) // int(settings["tracker.every_steps"])
    failure = _run(command, folder / "train.log", seconds, lambda: len(reports()) >= min(_REPORTS, num_reports))
    # The first report contains the start of the workers, and compiling.
    measured = reports()[1:]
    shutil.rmtree(file.parent, ignore_errors=True)
    if not measured:
        raise RuntimeError(f"{' '.join(command)} ended before its second report: {failure}")
    rates, waits = ([line[key] for line in measured] for key in ("speed/pairs_per_second", "data/wait_fraction"))
    wait = statistics.median(waits)
    return {
        "micro_batch": run.micro_batch,
        "accumulation_steps": run.accumulation_steps,
        "pairs_per_second": statistics.median(rates),
        "pairs_per_second_of_reports": rates,
        "wait_fraction": wait,
        "workers": workers,
        "settings": settings,
        "note": f"waits for data {wait:.0%}; data.workers={workers}{failure and f'; {failure}'}",
    }


def training_settings(request: Request, run: Run, folder: Path, workers: int) -> dict[str, str]:
    """Return the settings that override the training run's preset: the sizes of its steps, and nothing but steps."""
    pairs_per_step = run.micro_batch * run.accumulation_steps
    num_steps = max(_FEWEST_STEPS, round(request.num_pairs / pairs_per_step))
    settings: dict[str, object] = {
        "name": f"{run.describe()}-{run.micro_batch}x{run.accumulation_steps}",
        "run_root": folder / "runs",
        "model.vision.weights": "none",
        "model.text.weights": "none",
        "data.train_shards": folder / "shards",
        "data.eval_shards": "",
        "data.workers": workers,
        "data.micro_batch_size": run.micro_batch,
        "data.global_batch_size": pairs_per_step,
        "data.negative_group_size": math.gcd(run.micro_batch, 32),
        "optim.total_steps": num_steps,
        "optim.implementation": request.optimizer,
        "engine.threads_per_rank": 1 if request.small else 0,
        "compute.compile": str(run.compiled).lower(),
        "compute.cuda_graphs": str(run.compute.cuda_graphs).lower(),
        "evaluation.every_steps": 0,
        "checkpoint.every_steps": 10**9,  # the last step is always saved
        "tracker.every_steps": max(1, num_steps // _REPORTS),
        "tracker.wandb": "off",
    }
    return {name: str(value) for name, value in settings.items()}


def _run(command: list[str], log: Path, seconds: float, is_enough: Callable[[], bool] = lambda: False) -> str:
    """Run a script of this repository, to its end or until ``is_enough`` returns True.

    Returns: why neither happened; empty if one did.
    """
    end, code = time.monotonic() + max(1.0, seconds), None
    with log.open("w") as file:  # the workers of a killed run would keep a pipe open
        process = subprocess.Popen([sys.executable, *command], cwd=_REPO, stdout=file, stderr=subprocess.STDOUT)
    try:
        while code is None and time.monotonic() < end and not (enough := is_enough()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.5)
    finally:
        process.kill()  # its workers end when they notice
        process.wait()  # then its GPU memory is free
    if code is None:
        return "" if enough else f"stopped after {seconds:.0f} s, before its end"
    return f"exit code {code}: {log.read_text().strip()[-1000:]}" if code else ""
