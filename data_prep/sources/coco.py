"""COCO captions in Karpathy's splits, for pretraining: images are scaled down (coco_retrieval keeps their size).

Files below --raw:
    karpathy/dataset_coco.json           captions and splits: train, restval, val, test
    train2014/COCO_train2014_*.jpg       COCO's images of 2014
    val2014/COCO_val2014_*.jpg
Each split becomes a corpus folder; models are pretrained on train and restval. A split with missing images is built
from the others, and the missing ones are counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.karpathy import COCO_ATTRIBUTION, read_coco_records
from data_prep.record import ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = COCO_ATTRIBUTION


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per image, with its five captions or more.

    Raises:
        ConfigError: --raw is missing.
        DataError: the file of captions is missing, or not as published.
    """
    yield from read_coco_records(options, "coco")
