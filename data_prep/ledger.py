"""Counts the rows and images of one shard, and reports progress while the shard is written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bridgetower.shards.manifest import Totals
from bridgetower.shards.sample import Sample

_NOTE_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """Work that a worker has done since it last reported."""

    samples: int = 0
    """Number of images read, rejected ones included."""
    images: int = 0
    """Number of images written."""
    bytes: int = 0
    """Bytes of the images written."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Number of rejected texts by reason."""


Note = Callable[[Progress], None]


class Ledger:
    """Counts of a shard's rows and images: how many were accepted, and how many rejected for which reason."""

    def __init__(self, note: Note) -> None:
        """Begin a shard.

        Args:
            note: called now and then with the work done since its last call.
        """
        self.rows = self.images_in = self.images = self.captions = self.words = 0
        self.rejects: Counter[str] = Counter()
        self.image_rejects: Counter[str] = Counter()
        self._note, self._last = note, time.monotonic()
        self._samples = self._images = self._bytes = 0
        self._rejects: Counter[str] = Counter()

    def reject(self, reason: str, rows: int = 1) -> None:
        """Count texts that do not become captions."""
        self.rejects[reason] += rows
        self._rejects[reason] += rows

    def reject_image(self, reason: str, rows: int) -> None:
        """Count an image that does not become a sample, and its texts that were not rejected before."""
        self.image_rejects[reason] += 1
        self.reject(reason, rows)
        self._tick()

    def accept(self, sample: Sample) -> None:
        """Count a sample."""
        self.images += 1
        self.captions += len(sample.captions)
        self.words += sum(len(caption.split()) for caption in sample.captions)
        self._images += 1
        self._bytes += len(sample.image) + len(sample.second_image)
        self._tick()

    def _tick(self) -> None:
        self._samples += 1
        now = time.monotonic()
        if now - self._last > _NOTE_SECONDS:
            self._last = now
            self.flush()

    def flush(self) -> None:
        """Report the work that has not been reported yet."""
        self._note(Progress(self._samples, self._images, self._bytes, self._rejects))
        self._samples, self._images, self._bytes, self._rejects = 0, 0, 0, Counter()

    def totals(self, num_bytes: int) -> Totals:
        """Return all counts, for the manifest."""
        return Totals(
            rows=self.rows,
            images_in=self.images_in,
            images=self.images,
            captions=self.captions,
            bytes=num_bytes,
            caption_words=self.words,
            rejects=dict(sorted(self.rejects.items())),
            image_rejects=dict(sorted(self.image_rejects.items())),
        )
