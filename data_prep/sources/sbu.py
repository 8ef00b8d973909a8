"""SBU Captions: a million Flickr photographs with their users' descriptions, for pretraining.

Files below --raw, in one of three layouts:
  BridgeTower's
    sbu-captions-all.json                              the columns image_urls, user_names and captions
    SBU/<last part of the URL>                         images
  ViLT's and METER's
    annot.json                                         a list of [path, caption]
    images_train/<first 4 letters>/<name>
  img2dataset's, as fetch_corpus.py writes it
    webdataset/00000.tar                               or *.tar
    webdataset/00000_stats.json                        may be missing; counts the dead links
There are no splits. Some URLs end in the same file name. BridgeTower's published code kept only the caption of the last
such row; here every row is a sample of its own, named by its row number, and such rows share the image of that name.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.record import ImagePolicy, Record, Reject, SourceOptions
from data_prep.web_corpora import Part, WebCorpus, read_column_rows, read_web_records

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = (
    "Captions: SBU Captioned Photo Dataset (https://www.cs.rice.edu/~vo9/sbucaptions/), Vicente Ordonez, Girish "
    "Kulkarni, Tamara L. Berg. Pictures belong to their Flickr users, under Flickr's terms of use."
)

CORPUS = WebCorpus(
    name="sbu",
    parts=(
        Part(
            split="",
            table="sbu-captions-all.json",
            image_folder="SBU",
            list_file="annot.json",
            list_image_folder="images_train",
        ),
    ),
    read_rows=read_column_rows,
    is_named_by_row=False,
)


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per row that has, or should have, an image.

    Raises:
        ConfigError: --raw is missing.
        DataError: there is none of the layouts or more than one, or a file is not as described above.
    """
    yield from read_web_records(options, CORPUS)
