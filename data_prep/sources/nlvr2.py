"""NLVR2: sentences that are true or false of a pair of images.

Files below --raw:
    nlvr2/data/{train,dev,test1}.json                          JSON lines: sentence, identifier, label
    nlvr2/data/balanced/balanced_{dev,test1}.json              subsets of dev and test1; all four files may be missing,
    nlvr2/data/unbalanced/unbalanced_{dev,test1}.json          but not some of the four
    images/train/<directory>/<pair>-img{0,1}.png               the images, left (0) and right (1)
    dev/<pair>-img{0,1}.png
    test1/<pair>-img{0,1}.png
Each of train, dev, test1, balanced_dev, balanced_test1, unbalanced_dev and unbalanced_test1 becomes a corpus folder. A
pair of images is one sample with all its sentences, and the identifier and label (True 1, False 0) of each sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors
from bridgetower.shards.sample import safe_key
from data_prep.fields import field_error, get_file_name, get_text
from data_prep.raw_files import read_json_lines, require_files, require_raw_folder
from data_prep.record import ImageFile, ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
# Every row has its own identifier and label, and is scored.
KEEP_REPEATS = True
# A sample has two images, of any size that the web has.
SAMPLES_PER_SHARD = 1_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = (
    "NLVR2 (https://github.com/lil-lab/nlvr), Alane Suhr et al., Cornell University, CC BY 4.0 for the sentences. "
    "Pictures belong to their owners on the web and are given out for research only."
)

# split -> its file below nlvr2/data
_MAIN = {split: f"{split}.json" for split in ("train", "dev", "test1")}
_SUBSETS = {
    f"{kind}_{split}": f"{kind}/{kind}_{split}.json"
    for kind in ("balanced", "unbalanced")
    for split in ("dev", "test1")
}
_LABELS = {"True": 1, "False": 0}


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per row; the plan joins the records of a pair of images by their key.

    Raises:
        ConfigError: --raw is missing.
        DataError: a file is missing, or a row is not as published.
    """
    layout = "nlvr2/data/{train,dev,test1}.json and the images in images/train, dev and test1"
    raw = require_raw_folder(options, "nlvr2", layout)
    for split, file in _find_files(raw).items():
        is_empty = True
        for where, row in read_json_lines(file):
            is_empty = False
            label = get_text(row, "label", where)
            if label not in _LABELS:
                raise field_error(row, "label", where, " or ".join(_LABELS))
            pair = _get_pair(row, where)
            folder = _get_image_folder(raw, split, row, where)
            yield Record(
                key=safe_key(pair),
                image=ImageFile(path=folder / f"{pair}-img0.png"),
                second_image=ImageFile(path=folder / f"{pair}-img1.png"),
                image_id=f"nlvr2:{pair}",
                captions=(get_text(row, "sentence", where),),
                annotations=({"identifier": row["identifier"], "label": _LABELS[label]},),
                split=split,
            )
        if is_empty:
            raise DataError(f"{file} has no rows. Copy or download it again.")


def _find_files(raw: Path) -> dict[str, Path]:
    data = raw / "nlvr2" / "data"
    with explain_read_errors(data):
        has_subsets = any((data / name).is_file() for name in _SUBSETS.values())
    names = {**_MAIN, **_SUBSETS} if has_subsets else _MAIN
    paths = require_files(raw, [f"nlvr2/data/{name}" for name in names.values()], "nlvr2")
    return dict(zip(names, paths, strict=True))


def _get_pair(row: dict[str, Any], where: str) -> str:
    """Return the name of the pair of images: the identifier test1-28-1-0 is sentence 0 of the pair test1-28-1."""
    pair, _, sentence = get_file_name(row, "identifier", where).rpartition("-")
    if not pair or not sentence:
        raise field_error(row, "identifier", where, "of the form split-set-pair-sentence, such as dev-850-0-1")
    return pair


def _get_image_folder(raw: Path, split: str, row: dict[str, Any], where: str) -> Path:
    if split != "train":
        return raw / split.rpartition("_")[2]
    directory = row.get("directory")
    # A number in the published file, a text in copies of it.
    if isinstance(directory, int) and not isinstance(directory, bool) and directory >= 0:
        return raw / "images" / "train" / str(directory)
    return raw / "images" / "train" / get_file_name(row, "directory", where)
