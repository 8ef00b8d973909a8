"""CC3M, with captions of every kind that a table without quoting can hold."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.layouts import Expected, put
from tests.data_prep.layouts.web import LAYOUTS as LAYOUTS
from tests.data_prep.layouts.web import Row, expected_of, write_images, write_tar, write_vilt

TRAIN = (
    Row("a very typical bus station", "http://a.example/bus.jpg"),
    Row('she said " hello and never closed it', "http://a.example/1.png", "png"),
    Row(r"a literal \t and \n in the text", "http://a.example/2.webp", "webp"),
    Row("the link is dead", "http://a.example/3.jpg", "missing"),
    Row("half of the file arrived", "http://a.example/4.jpg", "truncated"),
    Row("a very typical bus station", "http://b.example/other_bus.gif?size=1", "gif"),
    Row("", "http://a.example/6.jpg"),
    Row('"a whole caption in quotes"', "http://a.example/7", ""),
    Row("nothing arrived", "http://a.example/8.jpg", "empty"),
    Row("a line\u2028separator, a \x0b tab and \u0085", "http://a.example/9.jpg", "jpeg"),
    Row("nobody answers", "http://a.example/10.jpg", "missing", "<urlopen error timed out>", "timeout"),
    Row("the sun sets — über dem Meer", "http://a.example/11.jpg"),
)
VAL = (
    Row("a cup of coffee", "http://c.example/0.jpg"),
    Row("a second dead link", "http://c.example/1.jpg", "missing"),
    Row("author : a life in pictures", "http://c.example/2.jpg", "png"),
)


def write(folder: Path, layout: str = "bridgetower") -> dict[str, Expected]:
    """Write both splits in one of the layouts. Returns: the counts that a build should have, by split."""
    if layout == "bridgetower":
        tables = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
        for split, rows in (("train", TRAIN), ("val", VAL)):
            put(folder / "utils" / tables[split], "".join(f"{row.caption}\t{row.url}\n" for row in rows))
            write_images(folder / f"{split}_image", rows)
            names = [file.name for file in (folder / f"{split}_image").iterdir()]
            put(folder / f"{split}_image_exist.txt", "".join(f"./{split}_image/{name}\n" for name in names))
        return {"train": expected_of(TRAIN), "val": expected_of(VAL)}
    if layout == "vilt":
        return {
            "train": write_vilt(folder, "images_train", "train_annot.json", TRAIN),
            "val": write_vilt(folder, "images_val", "val_annot.json", VAL),
        }
    return {
        "train": write_tar(folder / "webdataset" / "train", 0, TRAIN),
        "val": write_tar(folder / "webdataset" / "val", 0, VAL),
    }
