"""Labelled pairs for fine-tuning: an endless training stream, and held-out splits in blocks.

A pair, its augmentation and the random numbers of its hard negatives depend only on the seed and the pair's position.
Shapes: B pairs, C classes, N images, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower import rng
from bridgetower.batch import FinetuneBatch
from bridgetower.config.finetune import FinetuneDataConfig, TaskName
from bridgetower.data.augment import Augmentation
from bridgetower.data.corpora import Corpora, Pair, as_int64
from bridgetower.data.images import load_whole_image
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import I64, Loaded, PairStream
from bridgetower.data.targets import make_target
from bridgetower.data.text import Tokenizer, pad
from bridgetower.shards.cache import ShardCache


class LabelledStream(PairStream[FinetuneBatch]):
    """Micro-batches of one rank by number: augmented images, texts and targets."""

    config: FinetuneDataConfig

    def __init__(
        self,
        corpora: Corpora,
        order: Order,
        cut: Cut,
        config: FinetuneDataConfig,
        *,
        task: TaskName,
        classes: int,
        rank: int,
        seed: int,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
    ) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            classes: C, as ``targets.count_classes`` returns it.
        """
        super().__init__(
            corpora,
            order,
            cut,
            config,
            rank=rank,
            seed=seed,
            tokenizer=tokenizer,
            image_size_px=image_size_px,
            max_text_tokens=max_text_tokens,
        )
        self._task, self._classes = task, classes
        self._images_per_pair = 2 if task == "nlvr2" else 1
        self.max_images = cut.micro_batch_size * self._images_per_pair

    def read_into(self, pixels: Tensor, micro_step: int) -> FinetuneBatch:
        """Read and decode one micro-batch, with its images in the first rows of ``pixels``."""
        size = self.cut.micro_batch_size
        # In ``pixels`` stand all left images, then all right ones; in ``outs`` the images of each pair together.
        outs = pixels[: self.max_images].unflatten(0, (self._images_per_pair, size)).transpose(0, 1)
        positions_B, loaded = self._read(micro_step, list(outs))
        pairs = [one.pair for one in loaded]
        return _make_batch(
            pixels[: self.max_images],
            np.arange(size),
            pairs,
            task=self._task,
            classes=self._classes,
            tokenizer=self.tokenizer,
            max_text_tokens=self.max_text_tokens,
        )._replace(
            draw_B2=torch.from_numpy(
                np.stack(
                    [
                        rng.uniform(rng.key(self.seed, f"hard {modality}"), positions_B)
                        for modality in ("image", "text")
                    ],
                    axis=1,
                )
            ),
            replaced_B=torch.tensor([bool(one.replaced) for one in loaded]),
            notes=tuple(one.replaced for one in loaded if one.replaced),
        )

    def _decode(self, position: int, pair: Pair, out: Tensor | None) -> Loaded:
        assert out is not None, "labelled pairs are always decoded"
        for side, raw in enumerate((pair.image, pair.second_image)[: self._images_per_pair]):
            augmentation = None
            if self.config.augmentation != "none":
                key = rng.key(self.seed, "augmentation", position, side)
                augmentation = Augmentation(self.config.augmentation, key)
            load_whole_image(
                raw,
                self.image_size_px,
                pair.where,
                augmentation=augmentation,
                exact=self.config.exact_resize,
                out=out[side],
            )
        return Loaded(pair, "")


class LabelledSplit(Dataset[FinetuneBatch]):
    """A held-out folder in blocks of consecutive pairs. Each pair is in one block; none is skipped or replaced."""

    def __init__(
        self,
        folder: str | Path,
        *,
        task: TaskName,
        classes: int,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
        block_size: int,
        exact_resize: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        """Open the folder; pairs are read later.

        Args:
            classes: C, as ``targets.count_classes`` returns it.
            block_size: number of pairs per block; the last block may have fewer.
            exact_resize: decode large JPEGs in full, as data.exact_resize does for training images.
            cache: folder for shards of a remote folder.
        """
        self._corpora = Corpora([folder], cache)
        self.name = self._corpora.names[0]
        self.num_pairs = self._corpora.pairs_of_corpus(0)
        self._task, self._classes, self._tokenizer = task, classes, tokenizer
        self._image_size_px, self._max_text_tokens = image_size_px, max_text_tokens
        self._block_size, self._exact_resize = block_size, exact_resize

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.num_pairs // self._block_size)

    def __getitem__(self, block: int) -> FinetuneBatch:
        """Read and decode one block. An image that has several texts in the block is decoded once."""
        first = block * self._block_size
        numbers = range(first, min(first + self._block_size, self.num_pairs))
        pairs = [self._corpora.read(*self._corpora.pair_of_corpus(0, number)) for number in numbers]
        rows: dict[tuple[int, int], int] = {}
        image_B = np.array([rows.setdefault((pair.shard, pair.sample), len(rows)) for pair in pairs])
        first_pairs = [pairs[int(np.flatnonzero(image_B == row)[0])] for row in range(len(rows))]
        files = [(pair, pair.image) for pair in first_pairs]
        if self._task == "nlvr2":
            files += [(pair, pair.second_image) for pair in first_pairs]
        pixels = torch.stack(
            [load_whole_image(raw, self._image_size_px, pair.where, exact=self._exact_resize) for pair, raw in files]
        )
        return _make_batch(
            pixels,
            image_B,
            pairs,
            task=self._task,
            classes=self._classes,
            tokenizer=self._tokenizer,
            max_text_tokens=self._max_text_tokens,
        )


def _make_batch(
    pixels_N3SS: Tensor,
    image_B: I64,
    pairs: Sequence[Pair],
    *,
    task: TaskName,
    classes: int,
    tokenizer: Tokenizer,
    max_text_tokens: int,
) -> FinetuneBatch:
    ids_BL = pad(tokenizer.encode([pair.caption for pair in pairs], max_text_tokens), tokenizer.pad_id)
    return FinetuneBatch(
        pixels_N3SS=pixels_N3SS,
        ids_BL=torch.from_numpy(ids_BL),
        attention_mask_BL=torch.from_numpy(ids_BL != tokenizer.pad_id),
        image_B=torch.from_numpy(image_B),
        target_BC=torch.from_numpy(np.stack([make_target(pair, task, classes) for pair in pairs])),
        image_id_B=torch.from_numpy(as_int64(np.array([pair.image_id for pair in pairs], np.uint64))),
        draw_B2=torch.zeros(len(pairs), 2, dtype=torch.float64),
        replaced_B=torch.zeros(len(pairs), dtype=torch.bool),
    )
