"""Conceptual Captions (CC3M): images from the web with their cleaned alt texts, for pretraining.

Files below --raw, in one of three layouts:
  BridgeTower's
    utils/Train_GCC-training.tsv                       caption, tab, URL; as Google publishes it
    utils/Validation_GCC-1.1.0-Validation.tsv
    train_image/<row>.<ext>, val_image/<row>.<ext>     images; rows count from 0, with any extension or none
  ViLT's and METER's
    train_annot.json, val_annot.json                   lists of [path, caption]
    images_train/<first 4 letters>/<name>, images_val/...
  img2dataset's, as fetch_corpus.py writes it
    webdataset/{train,val}/00000.tar                   or train/*.tar and val/*.tar, or *.tar, which is train
    webdataset/{train,val}/00000_stats.json            may be missing; counts the dead links
Each of train and val becomes a corpus folder; a split without its image folder or tars is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.record import ImagePolicy, Record, Reject, SourceOptions
from data_prep.web_corpora import Part, WebCorpus, read_caption_url_rows, read_web_records

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = (
    "Captions: Conceptual Captions (https://ai.google.com/research/ConceptualCaptions), Google LLC, free for any "
    "purpose. Pictures belong to their owners on the web."
)

CORPUS = WebCorpus(
    name="cc3m",
    parts=(
        Part(
            split="train",
            table="utils/Train_GCC-training.tsv",
            image_folder="train_image",
            list_file="train_annot.json",
            list_image_folder="images_train",
        ),
        Part(
            split="val",
            table="utils/Validation_GCC-1.1.0-Validation.tsv",
            image_folder="val_image",
            list_file="val_annot.json",
            list_image_folder="images_val",
        ),
    ),
    read_rows=read_caption_url_rows,
    is_named_by_row=True,
)


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per row that has, or should have, an image.

    Raises:
        ConfigError: --raw is missing.
        DataError: there is none of the layouts or more than one, or a file is not as described above.
    """
    yield from read_web_records(options, CORPUS)
