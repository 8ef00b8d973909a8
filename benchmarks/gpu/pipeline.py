"""From photographs to training steps: the real loader and the real training script, on shards that are made here."""

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
# Whether shapes are small, and how many photographs there are: each is in the page cache after it was read once.
_NUM_PHOTOS = {False: 512, True: 16}
_PHOTO_SIZE = (640, 480)
_CAPTIONS_PER_PHOTO = 8
_REPORTS = 8  # of a training run, or as many as it has steps
_FEWEST_STEPS = 5
_WORDS = ("a", "photograph", "of", "some", "thing", "that", "stands", "in", "the", "light", "beside", "another", "one")


def measure(request: Request, note: Callable[[dict[str, Any]], None]) -> None:
    """Build the shards and train over them, once for each of the request's runs."""
    begin, cores = time.perf_counter(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        photographs = _build_shards(folder, _NUM_PHOTOS[request.small])
        for run in request.runs:
            # A little before this process is killed, so that what the run has reported by then is kept.
            seconds = request.seconds - (time.perf_counter() - begin) - 5
            found = _train(request, run, folder, max(1, cores - 2), seconds)
            what = f"train.py, {run.describe()}, {run.micro_batch * run.accumulation_steps:,} pairs a step"
            note({"what": what, "model": request.preset, "photographs": photographs, **found})


def _build_shards(folder: Path, count: int) -> str:
    """Shards of photographs, built by the command that people use. Returns: what they are."""
    origin = "cut from scikit-image's"
    try:
        photos = cut_photos(_PHOTO_SIZE, count)
    except (ConfigError, ImportError, OSError) as error:
        origin, photos = f"made up, as there are none: {error}", synthetic_photos(_PHOTO_SIZE, count)
    (folder / "raw").mkdir()
    lines = ["image,caption"]
    # <s> and </s> are counted, and each of the words is a token.
    lengths = iter(caption_lengths(count * _CAPTIONS_PER_PHOTO, MEAN_TOKENS, PUBLISHED_TOKENS))
    for number, raw in enumerate(photos):
        (folder / "raw" / f"{number:05d}.jpg").write_bytes(raw)
        for _ in range(_CAPTIONS_PER_PHOTO):
            lines.append(f"{number:05d}.jpg,{' '.join(_WORDS[n % len(_WORDS)] for n in range(next(lengths) - 2))}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    flags = {"raw": "raw", "captions": "captions.csv", "out": "shards"}
    command = ["data_prep/build_shards.py", "folder", *(f"--{flag}={folder / file}" for flag, file in flags.items())]
    said = _run([*command, f"--samples_per_shard={max(1, count // 8)}"], folder / "build.log", seconds=300)
    if said:
        raise RuntimeError(f"The shards of the photographs cannot be built: {said}")
    return f"{count} of {_PHOTO_SIZE[0]}x{_PHOTO_SIZE[1]}, {origin}"


def synthetic_photos(size: tuple[int, int], count: int, *, seed: int = 0) -> list[bytes]:
    """JPEGs of quality 90 with about as many bytes a pixel as photographs, for machines without scikit-image.

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
            summed += (np.asarray(coarse, np.float64) - 128) * 2 / cells**0.5  # finer is weaker, as in photographs
        stream = io.BytesIO()
        Image.fromarray(summed.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        photos.append(stream.getvalue())
    return photos


def _train(request: Request, run: Run, folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Run pretrain/train.py and read its metrics; it is ended after its last report, before it saves gigabytes.

    Raises:
        RuntimeError: it ended before its second report.
    """
    settings = training_settings(request, run, folder, workers)
    command = ["pretrain/train.py", request.preset, *(f"--{name}={value}" for name, value in settings.items())]
    file = folder / "runs" / settings["name"] / "metrics.jsonl"

    def reports() -> list[dict[str, Any]]:
        # A line that is being written is not one yet.
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [line for line in map(json.loads, lines) if "speed/pairs_per_second" in line]

    num_reports = int(settings["optim.total_steps"]) // int(settings["tracker.every_steps"])
    said = _run(command, folder / "train.log", seconds, lambda: len(reports()) >= min(_REPORTS, num_reports))
    # The first report has the workers' start in it, and compiling.
    found = reports()[1:]
    shutil.rmtree(file.parent, ignore_errors=True)
    if not found:
        raise RuntimeError(f"{' '.join(command)} ended before its second report: {said}")
    rates, waits = ([line[key] for line in found] for key in ("speed/pairs_per_second", "data/wait_fraction"))
    wait = statistics.median(waits)
    return {
        "micro_batch": run.micro_batch,
        "accumulation_steps": run.accumulation_steps,
        "pairs_per_second": statistics.median(rates),
        "pairs_per_second_of_reports": rates,
        "wait_fraction": wait,
        "workers": workers,
        "settings": settings,
        "note": f"waits for data {wait:.0%}; data.workers={workers}{said and f'; {said}'}",
    }


def training_settings(request: Request, run: Run, folder: Path, workers: int) -> dict[str, str]:
    """What the training run's preset is changed by: the sizes of its steps, and that there is nothing but steps."""
    pairs_of_step = run.micro_batch * run.accumulation_steps
    num_steps = max(_FEWEST_STEPS, round(request.num_pairs / pairs_of_step))
    settings: dict[str, object] = {
        "name": f"{run.describe()}-{run.micro_batch}x{run.accumulation_steps}",
        "run_root": folder / "runs",
        "model.vision.weights": "none",
        "model.text.weights": "none",
        "data.train_shards": folder / "shards",
        "data.eval_shards": "",
        "data.workers": workers,
        "data.micro_batch_size": run.micro_batch,
        "data.global_batch_size": pairs_of_step,
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
    """Run a script of this repository, to its end or until it is enough.

    Returns: why it did not come to either; empty if it did.
    """
    end, code = time.monotonic() + max(1.0, seconds), None
    with log.open("w") as file:  # not a pipe, which the workers of a killed run would keep open
        process = subprocess.Popen([sys.executable, *command], cwd=_REPO, stdout=file, stderr=subprocess.STDOUT)
    try:
        while code is None and time.monotonic() < end and not (enough := is_enough()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.5)
    finally:
        process.kill()  # its workers see that they are alone
        process.wait()  # what it held of the GPU is free then
    if code is None:
        return "" if enough else f"stopped after {seconds:.0f} s, before its end"
    return f"exit code {code}: {log.read_text().strip()[-1000:]}" if code else ""
