"""A held-out split: its images once, its captions once, in the order of its shards. Nothing is skipped or replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bridgetower import draws
from bridgetower.batch import ImageBatch, TextBatch
from bridgetower.data import collate
from bridgetower.data.corpora import Corpora, as_int64
from bridgetower.data.images import load_image
from bridgetower.data.shard_cache import ShardCache
from bridgetower.data.text import Tokenizer, pad


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
        cache: ShardCache | None = None,
    ) -> None:
        """Read the captions of the split; images are read when asked for.

        Args:
            max_images: 0 takes all.
            exact_resize: never decode at reduced scale, as for training pictures.
            cache: where shards of a remote folder are kept.
        """
        self._corpora = Corpora([folder], cache)
        self.name = self._corpora.names[0]
        self.tokenizer = tokenizer
        self._image_size_px, self._max_text_tokens = image_size_px, max_text_tokens
        self._mlm_probability, self._exact_resize = mlm_probability, exact_resize
        self._rows: list[tuple[int, int]] = []
        self.captions: list[str] = []
        image_of_caption: list[int] = []
        image_ids: list[int] = []
        for shard in range(len(self._corpora.shard_paths)):
            reader = self._corpora.reader(shard)
            for row in range(len(reader)):
                if max_images and len(self._rows) == max_images:
                    break
                raw = reader.read(row)
                image_of_caption += [len(self._rows)] * len(raw.record["captions"])
                self.captions += raw.record["captions"]
                self._rows.append((shard, row))
                image_ids.append(raw.image_id)
        self.num_images, self.num_captions = len(self._rows), len(self.captions)
        self.image_of_caption_T = torch.tensor(image_of_caption)
        self.image_id_N = torch.from_numpy(as_int64(np.array(image_ids, np.uint64)))

    def image_bytes(self, number: int) -> bytes:
        """The image file as it lies in the shard."""
        shard, row = self._rows[number]
        return self._corpora.reader(shard).read(row).image

    def image_batch(self, first: int, size: int) -> ImageBatch:
        """Decode ``size`` consecutive images."""
        numbers = range(first, min(first + size, self.num_images))
        return ImageBatch(
            first,
            torch.stack(
                [
                    load_image(
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
        """Tokenise and mask ``size`` consecutive captions. The mask of a caption depends on its number alone."""
        numbers = np.arange(first, min(first + size, self.num_captions))
        captions = [self.captions[number] for number in numbers]
        ids_TL = pad(self.tokenizer.encode(captions, self._max_text_tokens), self.tokenizer.pad_id)
        masked = collate.mask_tokens(
            ids_TL,
            numbers,
            self.tokenizer,
            stream=draws.key(seed, "held-out mlm"),
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
