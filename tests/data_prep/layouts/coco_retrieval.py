"""The files of coco: the two sources differ in what becomes of the pictures."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.layouts import Expected, coco

JSON_FILE = coco.JSON_FILE
IMAGES = coco.IMAGES
ROWS = coco.ROWS


def write(folder: Path) -> dict[str, Expected]:
    """Write it below a folder."""
    return coco.write(folder)
