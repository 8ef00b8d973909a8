"""A picture of random samples of a corpus with their captions, to see at a glance whether they belong together."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import matplotlib
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


def contact_sheet(folder: Path, manifest: Manifest, seed: int) -> bytes:
    """The sheet as a PNG; which samples it shows is a function of the seed.

    Args:
        folder: of the shards that the manifest lists, local or remote.
    """
    samples = list(_random_samples(folder, manifest, seed))
    rows = max(1, -(-len(samples) // _COLUMNS))
    step_x, step_y = _CELL_PX + _GAP_PX, _CELL_PX + _TEXT_PX + _GAP_PX
    sheet = Image.new("RGB", (_COLUMNS * step_x + _GAP_PX, rows * step_y + _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _GAP_PX + number % _COLUMNS * step_x, _GAP_PX + number // _COLUMNS * step_y
        draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), fill=_FRAME)
        picture = _picture(sample)
        sheet.paste(picture, (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2))
        draw.text((left, top + _CELL_PX + 4), _caption(sample), fill=_INK, font=_font(), spacing=2)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _random_samples(folder: Path, manifest: Manifest, seed: int) -> Iterator[RawSample]:
    counts = np.array([shard.samples for shard in manifest.shards], np.int64)
    total = int(counts.sum())
    chosen = rng.permute(rng.key(seed, "contact sheet"), np.arange(min(total, _COLUMNS * _ROWS)), total)
    first = np.concatenate([[0], np.cumsum(counts)])
    at = np.searchsorted(first, chosen, side="right") - 1
    for shard_number, sample in sorted(zip(at.tolist(), (chosen - first[at]).tolist(), strict=True)):
        shard = folder / manifest.shards[shard_number].name
        yield read_row(shard, load_index(shard)[sample])


def _picture(sample: RawSample) -> Image.Image:
    """Both pictures side by side where there are two."""
    parts = [decode_image(raw, "a sample") for raw in (sample.image, sample.second_image) if raw]
    for part in parts:
        part.thumbnail((_CELL_PX // len(parts), _CELL_PX))
    page = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), _FRAME)
    left = 0
    for part in parts:
        page.paste(part, (left, 0))
        left += part.width
    return page


def _caption(sample: RawSample) -> str:
    captions = sample.record["captions"]
    more = f" (+{len(captions) - 1})" if len(captions) > 1 else ""
    lines = textwrap.wrap(captions[0] + more, _LETTERS, max_lines=_LINES, placeholder=" ...")
    return "\n".join(lines)


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings and which knows most letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
