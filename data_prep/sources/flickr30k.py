"""Flickr30K captions in Karpathy's splits, for retrieval.

Files below --raw:
    karpathy/dataset_flickr30k.json      captions and splits: train, val, test
    flickr30k-images/*.jpg               the images; any that is in no split is ignored
Each split becomes a corpus folder.
"""

from __future__ import annotations

from collections.abc import Iterator

from bridgetower.shards.sample import safe_key
from data_prep.karpathy import read_karpathy_images
from data_prep.raw_files import require_files, require_raw_folder
from data_prep.record import ImageFile, ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = (
    "Captions: University of Illinois, Flickr30K (https://shannon.cs.illinois.edu/DenotationGraph/), for "
    "non-commercial research and education. Pictures belong to their Flickr users, under Flickr's terms of use. "
    "Splits: Andrej Karpathy, https://cs.stanford.edu/people/karpathy/deepimagesent."
)

_FILE = "karpathy/dataset_flickr30k.json"
_IMAGE_FOLDER = "flickr30k-images"
_SPLITS = ("train", "val", "test")


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per image, with its five captions.

    Raises:
        ConfigError: --raw is missing.
        DataError: the file of captions is missing, or not as published.
    """
    raw = require_raw_folder(options, "flickr30k", f"{_FILE} and the images in {_IMAGE_FOLDER}")
    (file,) = require_files(raw, [_FILE], "flickr30k")
    for image in read_karpathy_images(file, _SPLITS):
        yield Record(
            key=safe_key(image.stem),
            image=ImageFile(path=raw / _IMAGE_FOLDER / image.file_name),
            image_id=f"flickr30k:{image.stem}",
            captions=image.captions,
            split=image.split,
        )
