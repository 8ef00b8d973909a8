"""Training runs in the test's own process, which is restored afterwards."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.config.overrides import apply_overrides
from finetune.presets import PRESETS
from finetune.train import run
from tests.finetune.corpora import settings, write_pretrained, write_task

PRESET_OF = {"vqa": "tiny_vqav2", "snli_ve": "tiny_snli_ve", "nlvr2": "tiny_nlvr2", "retrieval": "tiny_flickr30k"}


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Build the corpora of all tasks (train: 8 images, dev: 3) and a pretrained model."""
    folder = tmp_path_factory.mktemp("finetune")
    for task in PRESET_OF:
        write_task(folder, task, "train", 8)
        write_task(folder, task, "dev", 3, first=50)
    write_pretrained(folder / "pretrained")
    return folder


@contextmanager
def restored_process() -> Iterator[None]:
    """Undo a run's changes to the process: environment, signals, threads, logging."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    logger = logging.getLogger("bridgetower")
    before = logger.handlers, logger.level, logger.propagate
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def train(root) -> Callable[..., Path]:
    """Return a function that trains the tiny preset of a task in this process and returns the run folder."""

    def train_here(task: str, name: str, steps: int, **more: str) -> Path:
        overrides = {**settings(task, root, name, steps), **{key.replace("__", "."): v for key, v in more.items()}}
        with restored_process():
            assert run(apply_overrides(PRESETS[PRESET_OF[task]](), overrides))
        return root / "runs" / name

    return train_here


def scores_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return content
