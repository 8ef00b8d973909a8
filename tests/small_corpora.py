"""Small corpora of real images, built by the shard writer itself."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bridgetower.shards.manifest import Manifest
from data_prep.build import Settings, Show, build_corpus
from data_prep.exclusion import Exclusion
from data_prep.plan import make_plan
from data_prep.record import ImageFile, ImagePolicy, Record, Reject


def draw(number: int, width: int = 24, height: int = 24) -> Image.Image:
    """Draw a smooth image, which differs for each number below 256."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = (number * 37) % 256, x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([np.full_like(x, red), green, blue], axis=-1).astype(np.uint8))


def file_of(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    """Return the content of an image file."""
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG of about 150 bytes whose header claims any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def build_records(
    records: Iterable[Record | Reject],
    out: Path,
    *,
    images: ImagePolicy | None = None,
    samples_per_shard: int = 5,
    seed: int = 0,
    workers: int = 0,
    keep_repeats: bool = False,
    exclusion: Exclusion | None = None,
    show: Show = lambda state: None,
) -> dict[str, Manifest]:
    """Build a corpus of records, as build_shards.py does. Returns: the manifest of each split."""
    settings = Settings(
        source="test",
        attribution="drawn here",
        images=images or ImagePolicy(short_side_px=0),
        samples_per_shard=samples_per_shard,
        seed=seed,
        keep_repeats=keep_repeats,
        exclusion=exclusion or Exclusion(),
    )
    with make_plan(records, seed=seed) as plan:
        manifests = build_corpus(plan, out, settings, workers=workers, show=show)
    assert isinstance(manifests, dict)
    return manifests


def write_corpus(
    folder: Path,
    captions_per_image: Sequence[int],
    *,
    samples_per_shard: int = 4,
    name: str = "corpus",
    first_image: int = 0,
    image_format: str = "PNG",
) -> Path:
    """Build a corpus of drawn images, with captions that name their image and their number.

    Args:
        captions_per_image: number of captions of each image.
        first_image: number of the first image; other numbers are other images.

    Returns: the corpus folder.
    """
    raw = folder / f"{name}_raw"
    raw.mkdir(parents=True)
    records = []
    for number, count in enumerate(captions_per_image, first_image):
        path = raw / f"{number}.{image_format.lower()}"
        path.write_bytes(file_of(draw(number), image_format))
        # Captions of different lengths, so that batches have different widths.
        captions = tuple(
            f"{name} picture {number}, caption {caption}" + " longer" * (number % 5) for caption in range(count)
        )
        image = ImageFile(path=path)
        records.append(Record(key=f"k{number}", image=image, image_id=f"{name}:{number}", captions=captions))
    build_records(records, folder / name, samples_per_shard=samples_per_shard)
    return folder / name
