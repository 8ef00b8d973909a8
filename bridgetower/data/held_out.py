"""Held-out splits: each image and each caption once, in the order of the shards. Nothing is skipped or replaced.

Shapes: N images, T captions, L tokens, M masked tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bridgetower import rng
from bridgetower.batch import ImageBatch, TextBatch
from bridgetower.config.data import ReadingConfig
from bridgetower.data import choices
from bridgetower.data.corpora import Corpora, as_int64, open_corpora
from bridgetower.data.images import load_image, load_whole_image
from bridgetower.data.text import Tokenizer, pad
from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import to_path
from bridgetower.shards.cache import ShardCache
from bridgetower.shards.index import load_index
from bridgetower.shards.manifest import load_manifest

_CONCURRENT_READS = 16  # an object store takes long to answer, but answers many requests at once


class HeldOutSplit:
    """The first ``max_images`` images of a corpus folder, with all their captions."""

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
        mlm_probability: float,
        max_images: int = 0,
        exact_resize: bool = False,
        whole_images: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        """Read the captions of the split; images are read later.

        Args:
            max_images: number of images, the first ones; 0 takes all.
            exact_resize: decode large JPEGs in full, as data.exact_resize does for training images.
            whole_images: squash images to a square, as fine-tuning does, instead of cropping them.
            cache: folder for shards of a remote folder.
        """
        self._corpora = Corpora([folder], cache)
        self.name = self._corpora.names[0]
        self.tokenizer = tokenizer
        self._image_size_px, self._max_text_tokens = image_size_px, max_text_tokens
        self._mlm_probability, self._exact_resize = mlm_probability, exact_resize
        self._load = load_whole_image if whole_images else load_image
        self._samples: list[tuple[int, int]] = []  # shard and sample of each image
        self.captions: list[str] = []
        image_of_caption: list[int] = []
        image_ids: list[int] = []
        for shard in range(len(self._corpora.shard_paths)):
            reader = self._corpora.reader(shard)
            for sample in range(len(reader)):
                if max_images and len(self._samples) == max_images:
                    break
                raw = reader.read(sample)
                image_of_caption += [len(self._samples)] * len(raw.record["captions"])
                self.captions += raw.record["captions"]
                self._samples.append((shard, sample))
                image_ids.append(raw.image_id)
        self.num_images, self.num_captions = len(self._samples), len(self.captions)
        self.image_of_caption_T = torch.tensor(image_of_caption)
        self.image_id_N = torch.from_numpy(as_int64(np.array(image_ids, np.uint64)))

    def image_bytes(self, number: int) -> bytes:
        """Read the file of one image from its shard."""
        shard, sample = self._samples[number]
        return self._corpora.reader(shard).read(sample).image

    def image_batch(self, first: int, size: int) -> ImageBatch:
        """Decode ``size`` consecutive images, or fewer at the end of the split."""
        numbers = range(first, min(first + size, self.num_images))
        return ImageBatch(
            first,
            torch.stack(
                [
                    self._load(
                        self.image_bytes(number),
                        self._image_size_px,
                        f"{self.name}, image {number}",
                        exact=self._exact_resize,
                    )
                    for number in numbers
                ]
            ),
        )

    def text_batch(self, first: int, size: int, *, seed: int) -> TextBatch:
        """Tokenise and mask ``size`` consecutive captions, or fewer at the end of the split.

        The mask of a caption depends only on ``seed`` and the caption's number.
        """
        numbers = np.arange(first, min(first + size, self.num_captions))
        captions = [self.captions[number] for number in numbers]
        ids_TL = pad(self.tokenizer.encode(captions, self._max_text_tokens), self.tokenizer.pad_id)
        masked = choices.mask_tokens(
            ids_TL,
            numbers,
            self.tokenizer,
            stream=rng.key(seed, "held-out mlm"),
            probability=self._mlm_probability,
        )
        return TextBatch(
            first=first,
            clean_ids_TL=torch.from_numpy(ids_TL),
            masked_ids_TL=torch.from_numpy(masked.ids_BL),
            attention_mask_TL=torch.from_numpy(ids_TL != self.tokenizer.pad_id),
            mlm_index_M=torch.from_numpy(masked.index_M),
            mlm_label_M=torch.from_numpy(masked.label_M),
        )


def check_held_out(
    data: ReadingConfig,
    train: Corpora | None = None,
    *,
    least_images: int = 2,
    suggestion: str = "Remove them from one of the two, or give other data.eval_shards.",
) -> None:
    """Check the held-out folders of a run: different names, enough images, and none that the run trains on.

    Args:
        train: training corpora; None does not compare images with them.
        least_images: minimum number of images per folder; 2 where texts are matched with images.
        suggestion: last sentence of the error about images that are also trained on.

    Raises:
        ConfigError: two folders have the same last name, which names their scores, or a folder has images that the run
            trains on.
        DataError: a folder is missing or has too few images.
    """
    folders = data.eval_shards
    names = [to_path(folder).name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.eval_shards names two folders {name!r}, but scores are listed by that name. Rename one."
            )
    trained = image_ids(train) if train is not None and folders else None
    for folder in folders:
        if load_manifest(folder).totals.images < least_images:
            raise DataError(
                f"The held-out {folder} has a single image; matching and retrieval need two or more. Give another "
                "folder as data.eval_shards, or none."
            )
        if trained is not None:
            shared = int(np.isin(np.unique(image_ids(open_corpora([folder], data))), trained).sum())
            if shared:
                raise ConfigError(
                    f"{shared:,} images of the held-out {folder} are also in data.train_shards (same image_id), so its "
                    f"scores would be training scores. {suggestion}"
                )


def image_ids(corpora: Corpora) -> npt.NDArray[np.uint64]:
    """Read the 64-bit image ids of all samples from the row indexes alone."""
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        return np.concatenate(list(pool.map(lambda shard: load_index(shard)["image_id"], corpora.shard_paths)))
