"""Helpers of the commands that read finished shards: their folder, local copies of shards, and work on all cores."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import explain_read_errors, is_remote, to_path

T = TypeVar("T")


def require_shard_folder(text: str, usage: str) -> Path:
    """Return the folder that a command line names.

    Raises:
        ConfigError: the text is empty.
        DataError: there is no such folder.
    """
    if not text:
        raise ConfigError(f"Which folder? {usage}")
    folder = to_path(text)
    with explain_read_errors(folder):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder. Give the folder of a corpus, with its *.tar files.")
    return folder


@contextmanager
def copy_locally(file: Path) -> Iterator[Path]:
    """Yield a local file as it is, and a remote one as a temporary copy.

    Raises:
        DataError: the file cannot be read.
    """
    if not is_remote(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        copy = Path(folder) / file.name
        with explain_read_errors(file), file.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def map_shards(title: str, work: Callable[..., T], calls: Sequence[tuple[Any, ...]], workers: int) -> list[T]:
    """Call a function for each shard, on several cores, with a progress bar. Returns: its results, in order.

    Args:
        calls: arguments of each call.

    Raises:
        DataError: a worker process died, or the function raised it.
    """
    console = Console(stderr=True)
    results: dict[int, T] = {}
    if workers <= 1 or len(calls) <= 1:
        numbers = track(range(len(calls)), title, console=console, disable=not console.is_terminal)
        return [work(*calls[number]) for number in numbers]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(calls)), context) as pool:
        futures = {pool.submit(work, *call): number for number, call in enumerate(calls)}
        try:
            done = track(as_completed(futures), title, len(calls), console=console, disable=not console.is_terminal)
            for future in done:
                results[futures[future]] = future.result()
        except BrokenProcessPool:
            raise DataError(
                "A worker process died, most likely because memory ran out. Run the command again with fewer --workers."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(calls))]
