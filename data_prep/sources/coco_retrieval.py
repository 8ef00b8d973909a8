"""COCO captions in Karpathy's splits, for retrieval: the rows of coco, with images of full size.

Files below --raw:
    karpathy/dataset_coco.json           captions and splits: train, restval, val, test
    train2014/COCO_train2014_*.jpg       COCO's images of 2014
    val2014/COCO_val2014_*.jpg
Each split becomes a corpus folder; retrieval is trained on train and restval.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.karpathy import COCO_ATTRIBUTION, read_coco_records
from data_prep.record import ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
# Images of full size have five times the bytes of those for pretraining.
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = COCO_ATTRIBUTION


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per image, with its five captions or more.

    Raises:
        ConfigError: --raw is missing.
        DataError: the file of captions is missing, or not as published.
    """
    yield from read_coco_records(options, "coco_retrieval")
