"""SBU, a JSON of columns, with URLs that end in the same name."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data_prep.layouts import Expected, put
from tests.data_prep.layouts.web import LAYOUTS as LAYOUTS
from tests.data_prep.layouts.web import Row, content_of, expected_of, write_tar, write_vilt

_FLICKR = "http://static.flickr.com"
ROWS = (
    Row("Man sits in a rusted car buried in the sand on Waitarere beach", f"{_FLICKR}/2723/4385058960_b0f291553e.jpg"),
    Row("Interior design of modern white and brown living room", f"{_FLICKR}/3348/3183472382_156bcbc461.jpg"),
    # The first photograph again, on another server of Flickr's.
    Row("My rusted car, again", "http://farm5.static.flickr.com/4113/4385058960_b0f291553e.jpg"),
    Row("Deleted by its user", f"{_FLICKR}/1/2_3.jpg", "missing"),
    Row("half a file", f"{_FLICKR}/1/4_5.jpg", "truncated"),
    Row("", f"{_FLICKR}/1/6_7.jpg"),
    Row('a "quoted" tree\tand a tab', f"{_FLICKR}/1/8_9.jpg"),
)


def write(folder: Path, layout: str = "bridgetower") -> dict[str, Expected]:
    """Write the corpus in one of the layouts. Returns: the counts that a build should have."""
    if layout == "bridgetower":
        columns = {
            "image_urls": [row.url for row in ROWS],
            "user_names": ["somebody" for _ in ROWS],
            "captions": [row.caption for row in ROWS],
        }
        put(folder / "sbu-captions-all.json", json.dumps(columns))
        for number, row in enumerate(ROWS):
            content = content_of(number, row)
            if content is not None:
                put(folder / "SBU" / row.url.rsplit("/", 1)[-1], content)
        return {"": expected_of(ROWS)}
    if layout == "vilt":
        return {"": write_vilt(folder, "images_train", "annot.json", ROWS)}
    return {"": write_tar(folder / "webdataset", 0, ROWS)}
