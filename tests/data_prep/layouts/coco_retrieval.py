"""The files of coco, since the two sources differ only in how images are converted."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.layouts import Expected, coco

JSON_FILE = coco.JSON_FILE
IMAGES = coco.IMAGES
ROWS = coco.ROWS


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    return coco.write(folder)
