"""Conceptual 12M (CC12M): images from the web with their alt texts, for pretraining.

Files below --raw, in one of three layouts:
  BridgeTower's
    cc12m.tsv                                          URL, tab, caption; as Google publishes it
    image/<row>.<ext>                                  images; rows count from 0, with any extension or none
  ViLT's and METER's
    train_annot.json                                   a list of [path, caption]
    images_train/<first 4 letters>/<name>
  img2dataset's, as fetch_corpus.py writes it
    webdataset/00000.tar                               or *.tar
    webdataset/00000_stats.json                        may be missing; counts the dead links
There are no splits.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.record import ImagePolicy, Record, Reject, SourceOptions
from data_prep.web_corpora import Part, WebCorpus, read_url_caption_rows, read_web_records

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = (
    "Captions: Conceptual 12M (https://github.com/google-research-datasets/conceptual-12m), Google LLC, free for any "
    "purpose. Pictures belong to their owners on the web."
)

CORPUS = WebCorpus(
    name="cc12m",
    parts=(
        Part(
            split="",
            table="cc12m.tsv",
            image_folder="image",
            list_file="train_annot.json",
            list_image_folder="images_train",
        ),
    ),
    read_rows=read_url_caption_rows,
    is_named_by_row=True,
)


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per row that has, or should have, an image.

    Raises:
        ConfigError: --raw is missing.
        DataError: there is none of the layouts or more than one, or a file is not as described above.
    """
    yield from read_web_records(options, CORPUS)
