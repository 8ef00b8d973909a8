"""Settings of the data: what is read, and how it is cut into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.config.checks import check_positive
from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What is read, and how it is cut into batches, whatever is trained."""

    train_shards: tuple[str, ...]
    """Corpus folders (each with a shards.json), comma-separated on the command line."""
    eval_shards: tuple[str, ...] = ()
    """Held-out corpus folders; the first one gives the headline scores."""
    global_batch_size: int = 4096
    """Pairs of one optimiser step, over all ranks and micro-steps."""
    micro_batch_size: int = 32
    """Pairs on one rank in one forward pass."""
    corpus_weights: tuple[float, ...] = ()
    """How often each pair of a corpus is seen in an epoch, by corpus of train_shards; empty: once, as published."""
    shards_per_window: int = 64
    """Pairs are shuffled within windows of this many shards."""
    workers: int = 8
    """Processes per rank that prepare batches; 0 prepares them in the training process."""
    prefetch_batches: int = 4
    """Micro-batches each worker keeps ready."""
    exact_resize: bool = False
    """True decodes large JPEGs in full before they are scaled, as the published code does, instead of at a half or less
    where that leaves at least twice the side."""
    on_bad_sample: Literal["fail", "replace"] = "fail"
    """What happens to a pair that cannot be read: the run stops, or another pair of its corpus, which is a function of
    the position, takes its place, is counted and named in the log. Evaluation always stops."""
    max_bad_fraction: float = 0.001
    """With on_bad_sample=replace the run stops when more pairs than this share were replaced (of at least 10,000)."""
    cache_dir: str = ""
    """Folder on a local disk for shards of s3://, gs:// or http(s):// folders, shared by the ranks of a node."""
    cache_gb: float = 100.0
    """Most that cache_dir holds, in 10^9 bytes; at least three windows of shards."""

    def __post_init__(self) -> None:
        if not self.train_shards:
            raise ConfigError("data.train_shards is empty. Give at least one corpus folder: --data.train_shards=DIR.")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must be 0 or more.")
        check_positive(
            data__global_batch_size=self.global_batch_size,
            data__micro_batch_size=self.micro_batch_size,
            data__shards_per_window=self.shards_per_window,
            data__prefetch_batches=self.prefetch_batches,
            data__cache_gb=self.cache_gb,
        )
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction} must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    """What is read, and how it is cut into batches."""

    negative_group_size: int = 32
    """ITM negatives are drawn within this many consecutive pairs, whatever the number of ranks."""
    itm_negatives: Literal["group", "corpus"] = "group"
    """Where ITM negatives come from: group costs no further image; corpus reads another image of the same corpus for
    each, as the published code does."""
    record_pairs: bool = False
    """Write what each rank was given to runs/NAME/pairs/, in the form of pretrain/trace.py."""
