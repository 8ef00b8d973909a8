"""SNLI-VE: sentences that an image entails, contradicts, or leaves open.

Files below --raw:
    snli_ve/snli_ve_{train,dev,test}.jsonl   one pair of an image and a hypothesis per line; the image's field may be
                                             Flickr30K_ID or Flikr30kID, with .jpg or without
    flickr30k-images/*.jpg                   Flickr30K's images
Each split becomes a corpus folder. The texts are the hypotheses. Their annotations are the caption that the hypothesis
was written for (premise), the label (contradiction 0, neutral 1, entailment 2) and pair_id. Pairs without a gold label
are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridgetower.errors import DataError
from bridgetower.shards.sample import safe_key
from data_prep.fields import field_error, get_file_name, get_text
from data_prep.raw_files import read_json_lines, require_files, require_raw_folder
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions

FLAGS: dict[str, str] = {}
# The same hypothesis may have been written for several captions of an image; each row is scored.
KEEP_REPEATS = True
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = (
    "SNLI-VE (https://github.com/necla-ml/SNLI-VE), NEC Laboratories America, BSD 2-Clause, from SNLI "
    "(https://nlp.stanford.edu/projects/snli/), Stanford NLP Group, CC BY-SA 4.0. Pictures: Flickr30K, for "
    "non-commercial research and education; they belong to their Flickr users."
)

_SPLITS = ("train", "dev", "test")
_IMAGE_FOLDER = "flickr30k-images"
_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}
_NO_LABEL = "-"
_ID_FIELDS = ("Flickr30K_ID", "Flikr30kID")


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per row; the plan joins the records of an image by their key.

    Raises:
        ConfigError: --raw is missing.
        DataError: a file is missing, or a row is not as published.
    """
    raw = require_raw_folder(options, "snli_ve", f"snli_ve/snli_ve_{{{','.join(_SPLITS)}}}.jsonl and {_IMAGE_FOLDER}")
    files = require_files(raw, [f"snli_ve/snli_ve_{split}.jsonl" for split in _SPLITS], "snli_ve")
    for split, file in zip(_SPLITS, files, strict=True):
        is_empty = True
        for where, row in read_json_lines(file):
            is_empty = False
            label = get_text(row, "gold_label", where)
            if label == _NO_LABEL:
                yield Reject(reason="no gold label", split=split)
                continue
            if label not in _LABELS:
                raise field_error(row, "gold_label", where, f"one of {', '.join(_LABELS)}, or {_NO_LABEL}")
            name = _get_image_name(row, where)
            yield Record(
                key=safe_key(name),
                image=ImageFile(path=raw / _IMAGE_FOLDER / f"{name}.jpg"),
                image_id=f"flickr30k:{name}",
                captions=(get_text(row, "sentence2", where),),
                annotations=(
                    {
                        "premise": get_text(row, "sentence1", where),
                        "label": _LABELS[label],
                        "pair_id": get_text(row, "pairID", where),
                    },
                ),
                split=split,
            )
        if is_empty:
            raise DataError(f"{file} has no rows. Copy or download it again.")


def _get_image_name(row: dict[str, Any], where: str) -> str:
    """Return the name of the image without its suffix.

    The generator that SNLI-VE's authors published writes one field name, and their parser reads the other.
    """
    field = next((name for name in _ID_FIELDS if name in row), _ID_FIELDS[0])
    name = get_file_name(row, field, where).removesuffix(".jpg")
    if not name:
        raise field_error(row, field, where, "the name of an image")
    return name
