"""Draws a contact sheet: random samples of a corpus with their captions, to see at a glance whether they match."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bridgetower import rng
from bridgetower.shards.decode import decode_image
from bridgetower.shards.index import RawSample, load_index, read_row
from bridgetower.shards.manifest import Manifest

SHEET_NAME = "contact_sheet.png"

_COLUMNS, _ROWS = 6, 4
_CELL_PX, _TEXT_PX, _GAP_PX = 200, 66, 12
_LETTERS, _LINES = 33, 4
_PAPER, _FRAME, _INK = "white", "#e8e8e8", "#202020"


def draw_contact_sheet(folder: Path, manifest: Manifest, seed: int) -> bytes:
    """Draw the sheet. Returns: a PNG.

    Args:
        folder: folder of the shards that the manifest lists, local or remote.
        seed: chooses the samples; the same seed always gives the same sheet.
    """
    samples = list(_read_random_samples(folder, manifest, seed))
    rows = max(1, -(-len(samples) // _COLUMNS))
    step_x, step_y = _CELL_PX + _GAP_PX, _CELL_PX + _TEXT_PX + _GAP_PX
    sheet = Image.new("RGB", (_COLUMNS * step_x + _GAP_PX, rows * step_y + _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _GAP_PX + number % _COLUMNS * step_x, _GAP_PX + number // _COLUMNS * step_y
        draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), fill=_FRAME)
        image = _fit_image(sample)
        sheet.paste(image, (left + (_CELL_PX - image.width) // 2, top + (_CELL_PX - image.height) // 2))
        draw.text((left, top + _CELL_PX + 4), _wrap_caption(sample), fill=_INK, font=_load_font(), spacing=2)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _read_random_samples(folder: Path, manifest: Manifest, seed: int) -> Iterator[RawSample]:
    counts = np.array([shard.samples for shard in manifest.shards], np.int64)
    total = int(counts.sum())
    chosen = rng.permute(rng.key(seed, "contact sheet"), np.arange(min(total, _COLUMNS * _ROWS)), total)
    first = np.concatenate([[0], np.cumsum(counts)])
    shards = np.searchsorted(first, chosen, side="right") - 1
    for shard_number, row in sorted(zip(shards.tolist(), (chosen - first[shards]).tolist(), strict=True)):
        shard = folder / manifest.shards[shard_number].name
        yield read_row(shard, load_index(shard)[row])


def _fit_image(sample: RawSample) -> Image.Image:
    """Scale a sample's image down to a cell; two images are put side by side."""
    images = [decode_image(raw, "a sample") for raw in (sample.image, sample.second_image) if raw]
    for image in images:
        image.thumbnail((_CELL_PX // len(images), _CELL_PX))
    joined = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), _FRAME)
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    return joined


def _wrap_caption(sample: RawSample) -> str:
    captions = sample.record["captions"]
    more = f" (+{len(captions) - 1})" if len(captions) > 1 else ""
    lines = textwrap.wrap(captions[0] + more, _LETTERS, max_lines=_LINES, placeholder=" ...")
    return "\n".join(lines)


@lru_cache
def _load_font() -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    import matplotlib  # half as much CPU time as all other imports of the tools that use this file

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
