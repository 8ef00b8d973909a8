"""Lists the files of each corpus: their addresses, where they belong, and sizes and checksums where these are known.

Only sizes and checksums that several people published independently are listed. Others are left empty: a wrong one
would refuse a good file.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.sources import cc3m, cc12m, sbu
from data_prep.web_corpora import TARS_FOLDER, WebCorpus


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that can be downloaded."""

    url: str
    path: str
    """Path below --out; for an archive, a pattern of the files that it unpacks to, shown to people."""
    unpack_into: str = ""
    """For an archive, the folder below --out into which its members go, ``.`` for --out itself; otherwise empty."""
    size_bytes: int | None = None
    """None if unknown."""
    md5: str = ""
    """Hexadecimal digits; empty if unknown."""


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """Files that only their owner may give out."""

    what: str
    how: str
    """Whom to ask, and where to put the files that they send."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All files that one source of build_shards.py reads."""

    files: tuple[RemoteFile, ...]
    by_hand: tuple[ByHand, ...] = ()
    urls: WebCorpus | None = None
    """The corpus whose images are published as a list of URLs and downloaded with --images; None for any other."""


_COCO = "http://images.cocodataset.org/zips"
_TRAIN2014 = RemoteFile(
    url=f"{_COCO}/train2014.zip",
    path="train2014/*.jpg",
    unpack_into=".",
    size_bytes=13_510_573_713,
    md5="0da8c0bd3d6becc4dcb32757491aca88",
)
_VAL2014 = RemoteFile(
    url=f"{_COCO}/val2014.zip",
    path="val2014/*.jpg",
    unpack_into=".",
    size_bytes=6_645_013_297,
    md5="a3d79f5ed8d289b7a7554ce06a5782b3",
)
_TEST2015 = RemoteFile(url=f"{_COCO}/test2015.zip", path="test2015/*.jpg", unpack_into=".")
_KARPATHY = RemoteFile(
    url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    path="karpathy/dataset_{coco,flickr30k}.json",
    unpack_into="karpathy",
)
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_VG_ARCHIVES = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_VG = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
_VG_FILES = (
    RemoteFile(url=f"{_VG_ARCHIVES}/images.zip", path="images/VG_100K/*.jpg", unpack_into="images"),
    RemoteFile(url=f"{_VG_ARCHIVES}/images2.zip", path="images/VG_100K_2/*.jpg", unpack_into="images"),
    RemoteFile(url=f"{_VG}/image_data.json.zip", path="image_data.json", unpack_into="."),
)
_COCO_SPLITS = "https://raw.githubusercontent.com/peteanderson80/bottom-up-attention/master/data/genome/coco_splits"
_NLVR2 = "https://raw.githubusercontent.com/lil-lab/nlvr/master/nlvr2/data"
_NLVR2_FILES = (
    *("train.json", "dev.json", "test1.json"),
    *("balanced/balanced_dev.json", "balanced/balanced_test1.json"),
    *("unbalanced/unbalanced_dev.json", "unbalanced/unbalanced_test1.json"),
)
_FLICKR30K_IMAGES = ByHand(
    what="flickr30k-images/ (31,783 images)",
    how="Fill in the request form at https://shannon.cs.illinois.edu/DenotationGraph/ (it is for research and "
    "education); you are sent the address of flickr30k-images.tar.gz. Unpack it below --out.",
)
_COCO_CAPTIONS = Corpus(files=(_KARPATHY, _TRAIN2014, _VAL2014))


CATALOGUE: dict[str, Corpus] = {
    "cc3m": Corpus(
        files=(
            RemoteFile(
                url="https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv",
                path=cc3m.CORPUS.parts[0].table,
            ),
            RemoteFile(
                url="https://storage.googleapis.com/gcc-data/Validation/GCC-1.1.0-Validation.tsv",
                path=cc3m.CORPUS.parts[1].table,
            ),
        ),
        urls=cc3m.CORPUS,
    ),
    "cc12m": Corpus(
        files=(
            RemoteFile(url="https://storage.googleapis.com/conceptual_12m/cc12m.tsv", path=cc12m.CORPUS.parts[0].table),
        ),
        urls=cc12m.CORPUS,
    ),
    "sbu": Corpus(
        files=(
            RemoteFile(
                url="https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz",
                path="sbu-captions-all.json",
                unpack_into=".",
            ),
        ),
        urls=sbu.CORPUS,
    ),
    "coco": _COCO_CAPTIONS,
    "coco_retrieval": _COCO_CAPTIONS,
    "flickr30k": Corpus(files=(_KARPATHY,), by_hand=(_FLICKR30K_IMAGES,)),
    "vg": Corpus(
        files=(
            *_VG_FILES,
            RemoteFile(
                url=f"{_VG}/region_descriptions.json.zip",
                path="annotations/region_descriptions.json",
                unpack_into="annotations",
            ),
        )
    ),
    "vgqa": Corpus(
        files=(
            *_VG_FILES,
            RemoteFile(
                url=f"{_VG}/question_answers.json.zip",
                path="annotations/question_answers.json",
                unpack_into="annotations",
            ),
            *(
                RemoteFile(
                    url=f"{_COCO_SPLITS}/karpathy_{split}_images.txt",
                    path=f"coco_splits/karpathy_{split}_images.txt",
                )
                for split in ("train", "val", "test")
            ),
        )
    ),
    "vqav2": Corpus(
        files=(
            RemoteFile(
                url=f"{_VQA}/v2_Questions_Train_mscoco.zip",
                path="vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
                unpack_into="vqav2",
            ),
            RemoteFile(
                url=f"{_VQA}/v2_Questions_Val_mscoco.zip",
                path="vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
                unpack_into="vqav2",
                size_bytes=3_494_929,
            ),
            RemoteFile(
                url=f"{_VQA}/v2_Questions_Test_mscoco.zip",
                path="vqav2/v2_OpenEnded_mscoco_test{-dev,}2015_questions.json",
                unpack_into="vqav2",
            ),
            RemoteFile(
                url=f"{_VQA}/v2_Annotations_Train_mscoco.zip",
                path="vqav2/v2_mscoco_train2014_annotations.json",
                unpack_into="vqav2",
                size_bytes=21_708_861,
            ),
            RemoteFile(
                url=f"{_VQA}/v2_Annotations_Val_mscoco.zip",
                path="vqav2/v2_mscoco_val2014_annotations.json",
                unpack_into="vqav2",
                size_bytes=10_518_930,
            ),
            _TRAIN2014,
            _VAL2014,
            _TEST2015,
        )
    ),
    "snli_ve": Corpus(
        files=(),
        by_hand=(
            ByHand(
                what="snli_ve/snli_ve_{train,dev,test}.jsonl",
                how="https://github.com/necla-ml/SNLI-VE links them, on Google Drive, where a browser has to "
                "confirm the download. Put them into snli_ve below --out.",
            ),
            _FLICKR30K_IMAGES,
        ),
    ),
    "nlvr2": Corpus(
        files=tuple(RemoteFile(url=f"{_NLVR2}/{name}", path=f"nlvr2/data/{name}") for name in _NLVR2_FILES),
        by_hand=(
            ByHand(
                what="images/train/, dev/ and test1/ (the images)",
                how="Sign the form that https://github.com/lil-lab/nlvr/tree/master/nlvr2 links (for research "
                "only); you are sent the images' address. Unpack them below --out.",
            ),
        ),
    ),
}
"""The files of each corpus, by the name of its source."""


def get_tar_folder(split: str) -> str:
    """Return the folder below --out for the downloaded images of a split."""
    return f"{TARS_FOLDER}/{split}" if split else TARS_FOLDER
