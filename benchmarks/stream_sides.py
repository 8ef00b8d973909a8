"""One side of benchmarks/data_stream.py: python -m benchmarks.stream_sides SIDE SHARDS WORKERS.

Each line of standard input is a number of seconds. The process takes batches for that long, waits until its workers
have filled their buffers and rest, and prints a line of JSON: the pairs, the wall-clock seconds, and the processor
seconds of this process and its workers. So sides can take turns while all of them stay alive.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from bridgetower.config.data import DataConfig
from bridgetower.data.corpora import Corpora
from bridgetower.data.images import load_image
from bridgetower.data.loader import micro_batches
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer

SIDE_PX = 288
BATCH = 32
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Workers start and fill their buffers before the clock runs.
_WARM_UP_BATCHES = 12
# Workers rest if they use less than a fifth of this much processor time in as many seconds. Processor clocks tick every
# 0.01 s.
_REST_SECONDS = 0.1


def our_stream(folder: Path, workers: int, *, batch: int = BATCH, side_px: int = SIDE_PX) -> PretrainStream:
    """Return the stream of a training run over a folder of shards."""
    corpora = Corpora([folder])
    order = Order(corpora.pairs_per_shard, corpora.corpus_of_shard, seed=0, shards_per_window=64)
    config = DataConfig(train_shards=(str(folder),), workers=workers, micro_batch_size=batch, negative_group_size=batch)
    return PretrainStream(
        corpora,
        order,
        Cut(batch, batch, 1),
        config,
        rank=0,
        seed=0,
        tokenizer=Tokenizer("roberta"),
        image_size_px=side_px,
        max_text_tokens=50,
        mlm_probability=0.15,
    )


def _ours(folder: Path, workers: int) -> Iterator[Any]:
    return micro_batches(our_stream(folder, workers), 0, 10**9)


def _plain(folder: Path, workers: int) -> Iterator[Any]:
    """Iterate over the pipeline of webdataset's documentation: Pillow decodes, torchvision transforms."""
    from torchvision import transforms  # takes seconds to import

    transform = transforms.Compose(
        [
            transforms.Resize(SIDE_PX, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE_PX),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    urls = sorted(map(str, folder.glob("*.tar")))
    pipeline = webdataset.WebDataset(urls, shardshuffle=100, seed=0, nodesplitter=webdataset.split_by_node)
    samples = pipeline.shuffle(500, initial=100).decode("pil").to_tuple("jpg", "txt")
    batches = samples.map_tuple(transform, _unchanged).batched(BATCH, partial=False).repeat()
    return iter(DataLoader(batches, batch_size=None, num_workers=workers))


def _open_clip(folder: Path, workers: int) -> Iterator[Any]:
    import open_clip
    import open_clip_train.data

    # open_clip 3.3 does not know the end-of-file marks that webdataset 1.0 puts between the members of two tars.
    open_clip_train.data.tar_file_expander = partial(open_clip_train.data.tar_file_expander, eof_value=None)
    shards = "::".join(sorted(map(str, folder.glob("*.tar"))))
    arguments = Namespace(
        train_data=shards,
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    preprocess = open_clip.image_transform(SIDE_PX, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    data = open_clip_train.data.get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=tokenizer)
    return iter(data.dataloader)


def _limit(folder: Path, workers: int) -> Iterator[Any]:
    """Decode and resize images from memory, in this process."""
    urls = sorted(map(str, folder.glob("*.tar")))
    images = [sample["jpg"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    rounds = itertools.cycle(images)
    while True:
        yield [load_image(next(rounds), SIDE_PX, "a photograph") for _ in range(BATCH)]


def _unchanged(value: Any) -> Any:
    return value


LIMIT, OURS = "decode + resize alone", "this stream"
SIDES: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    LIMIT: _limit,
    OURS: _ours,
    "webdataset, plain": _plain,
    "open_clip": _open_clip,
}


def serve(side: str, folder: Path, workers: int) -> None:
    """Take batches for as many seconds as each line of standard input says.

    Args:
        workers: number of worker processes; decoding alone has none.
    """
    Image.init()
    torch.set_num_threads(1)
    batches = SIDES[side](folder, workers)
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    _, busy = _wait_for_rest()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, start, taken = float(line), time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            taken += BATCH
        before, (end, busy) = busy, _wait_for_rest()
        print(json.dumps({"pairs": taken, "seconds": end - start, "busy_seconds": busy - before}), flush=True)


def _wait_for_rest() -> tuple[float, float]:
    """Wait until the workers rest, and return when they began to, and the processor seconds until then."""
    busy = _busy_seconds()
    while True:
        now, before = time.perf_counter(), busy
        time.sleep(_REST_SECONDS)
        busy = _busy_seconds()
        if busy - before < 0.2 * _REST_SECONDS:
            return now, busy


def _busy_seconds() -> float:
    """Return the processor seconds of this process and its descendants."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


if __name__ == "__main__":
    # As in training: a thread per caption costs more than it saves.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name, shards, processes = sys.argv[1:]
    serve(name, Path(shards), int(processes))
