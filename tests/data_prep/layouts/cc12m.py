"""CC12M, whose table has the URL first."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.layouts import Expected, put
from tests.data_prep.layouts.web import LAYOUTS as LAYOUTS
from tests.data_prep.layouts.web import Row, add, expected_of, write_images, write_tar, write_vilt

ROWS = (
    Row("<PERSON> was the first US president", "https://d.example/0.jpg"),
    Row("5' 11\" tall, he said", "https://d.example/1.jpg", "png"),
    Row("gone", "https://d.example/2.jpg", "missing", "[Errno -2] Name or service not known", "no such host"),
    Row("half a file", "https://d.example/3.jpg", "truncated"),
    Row("   ", "https://d.example/4.jpg"),
    Row("two words 'and quotes", "https://d.example/5", ""),
    Row("also gone", "https://d.example/6.jpg", "missing"),
    Row("<PERSON> was the first US president", "https://d.example/7.jpg"),
)


def write(folder: Path, layout: str = "bridgetower") -> dict[str, Expected]:
    """Write the corpus in one of the layouts. Returns: the counts that a build should have."""
    if layout == "bridgetower":
        put(folder / "cc12m.tsv", "".join(f"{row.url}\t{row.caption}\n" for row in ROWS))
        write_images(folder / "image", ROWS)
        return {"": expected_of(ROWS)}
    if layout == "vilt":
        return {"": write_vilt(folder, "images_train", "train_annot.json", ROWS)}
    # One shard with its statistics, and one of an older copy without them.
    return {"": add(write_tar(folder, 0, ROWS[:4]), write_tar(folder, 1, ROWS[4:], has_stats=False))}
