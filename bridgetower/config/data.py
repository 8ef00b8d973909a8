"""Settings of the data: which shards are read, and how pairs are divided into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.config.checks import check_fraction, check_positive
from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """Shards and batches of any training run."""

    train_shards: tuple[str, ...]
    """Corpus folders to train on, each with a shards.json; comma-separated on the command line."""
    eval_shards: tuple[str, ...] = ()
    """Held-out corpus folders to evaluate on; the first one gives the headline scores."""
    global_batch_size: int = 4096
    """Number of pairs per optimiser step, over all ranks and micro-steps."""
    micro_batch_size: int = 32
    """Number of pairs per forward pass on one rank."""
    corpus_weights: tuple[float, ...] = ()
    """How often an epoch visits each pair of a corpus, one number per folder of train_shards. Empty: once, as
    published."""
    shards_per_window: int = 64
    """Number of shards in a window; pairs are shuffled within windows."""
    workers: int = 8
    """Number of processes per rank that prepare batches; 0 prepares them in the training process."""
    prefetch_batches: int = 4
    """Number of micro-batches that each worker keeps ready."""
    exact_resize: bool = False
    """True: decode large JPEGs in full before resizing, as the published code does. False: decode them at half scale or
    less where this leaves at least twice the side that the model reads."""
    on_bad_sample: Literal["fail", "replace"] = "fail"
    """What happens if a pair cannot be read. fail: the run stops. replace: another pair of the same corpus, which
    depends only on the position, replaces it, and is counted and named in the log. Evaluation always stops."""
    max_bad_fraction: float = 0.001
    """With on_bad_sample=replace, the run stops when replaced pairs exceed this fraction of all pairs read, or of
    10,000 if fewer were read."""
    cache_dir: str = ""
    """Folder on a local disk that keeps shards of s3://, gs:// and http(s):// folders; the ranks of a node share it."""
    cache_gb: float = 100.0
    """Maximum size of cache_dir in 10^9 bytes; three windows of shards must fit."""

    def __post_init__(self) -> None:
        if not self.train_shards:
            raise ConfigError("data.train_shards is empty. Give at least one corpus folder: --data.train_shards=DIR.")
        if self.workers < 0:
            raise ConfigError(
                f"data.workers={self.workers} must be 0 or more. 0 prepares batches in the training process."
            )
        check_positive(
            data__global_batch_size=self.global_batch_size,
            data__micro_batch_size=self.micro_batch_size,
            data__shards_per_window=self.shards_per_window,
            data__prefetch_batches=self.prefetch_batches,
            data__cache_gb=self.cache_gb,
        )
        check_fraction("data.max_bad_fraction", self.max_bad_fraction)


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    """Shards and batches of a pretraining run."""

    negative_group_size: int = 32
    """Number of consecutive pairs in a group. ITM negatives are drawn within groups, so that they do not depend on the
    number of ranks."""
    itm_negatives: Literal["group", "corpus"] = "group"
    """Source of ITM negatives. group: other images of the group, at no extra cost. corpus: another image of the same
    corpus is read for each negative, as the published code does."""
    record_pairs: bool = False
    """True: write the pairs that each rank receives to runs/NAME/pairs/, in the format of pretrain/trace.py."""
