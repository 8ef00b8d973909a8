"""Streams of training micro-batches, as pure functions of the micro-batch's number.

A pair, its position, its masks and the image that its caption is paired with depend only on the seed and the position:
not on the number of ranks or workers, nor on where a run was stopped. Shapes: B pairs, L tokens, M masked tokens, N
images.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower import rng
from bridgetower.batch import FinetuneBatch, PretrainBatch
from bridgetower.config.data import DataConfig, ReadingConfig
from bridgetower.data import choices
from bridgetower.data.corpora import Corpora, Pair, as_int64
from bridgetower.data.images import load_image
from bridgetower.data.order import Cut, Located, Order
from bridgetower.data.text import Tokenizer, pad
from bridgetower.errors import DataError

I64 = npt.NDArray[np.int64]
Batch = TypeVar("Batch", PretrainBatch, FinetuneBatch)

# Number of draws for the replacement of a pair that cannot be read, and for a negative that is not the same image.
_TRIES = 8
# Number of pairs that are located at once: NumPy takes 7.6 ms for 8,192 pairs, and 6.6 ms for 32.
_LOCATED_TOGETHER = 8_192


class Loaded(NamedTuple):
    """A pair that was read from its shard."""

    pair: Pair
    replaced: str
    """Why this pair replaces another one; empty if it does not."""


class MicroBatch(NamedTuple):
    """A micro-batch with all random choices made, before it becomes tensors."""

    positions_B: I64
    pairs: list[Loaded]
    negatives: list[Loaded]
    """Pairs whose images serve only as negatives (data.itm_negatives=corpus)."""
    ids_BL: I64
    masked: choices.MaskedTokens
    choice: choices.ImageChoice
    """Its rows count ``pairs``, then ``negatives``."""

    @property
    def images(self) -> list[Loaded]:
        """The pairs whose images are decoded, in the order of their rows."""
        return [*self.pairs, *self.negatives]


class PairStream(Dataset[Batch], Generic[Batch]):
    """Micro-batches of one rank by number. Base of the streams for pretraining and fine-tuning."""

    max_images: int
    """Maximum number of images in a micro-batch."""

    def __init__(
        self,
        corpora: Corpora,
        order: Order,
        cut: Cut,
        config: ReadingConfig,
        *,
        rank: int,
        seed: int,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
    ) -> None:
        """Describe the stream; nothing is read yet."""
        self.corpora, self.order, self.cut, self.config = corpora, order, cut, config
        self.rank, self.seed = rank, seed
        self.tokenizer = tokenizer
        self.image_size_px, self.max_text_tokens = image_size_px, max_text_tokens
        # Micro-steps that are located already, and the pairs of all of them.
        self._located: tuple[range, Located] | None = None

    def __getitem__(self, micro_step: int) -> Batch:
        """Read, decode and collate one micro-batch.

        Args:
            micro_step: counted from the start of the run.

        Raises:
            DataError: a pair cannot be read and data.on_bad_sample=fail, or no replacement can be read.
        """
        side = self.image_size_px
        return self.read_into(torch.empty(self.max_images, 3, side, side, dtype=torch.uint8), micro_step)

    @abstractmethod
    def read_into(self, pixels: Tensor, micro_step: int) -> Batch:
        """Read, decode and collate one micro-batch, with its images in the first rows of ``pixels``.

        Args:
            pixels: uint8, shape (max_images, 3, S, S).
            micro_step: counted from the start of the run.

        Raises:
            DataError: a pair cannot be read and data.on_bad_sample=fail, or no replacement can be read.
        """

    @abstractmethod
    def _decode(self, position: int, pair: Pair, out: Tensor | None) -> Loaded:
        """Decode the image of a pair (NLVR2: both).

        Args:
            out: tensor to write to; None does not decode.

        Raises:
            DataError: an image cannot be decoded.
        """

    def _read(self, micro_step: int, outs: Tensor | Sequence[Tensor] | None) -> tuple[I64, list[Loaded]]:
        """Read the pairs of a micro-batch, and decode them into ``outs`` if it is given.

        Returns: the pairs' positions, int64, shape (B,), and the pairs.
        """
        positions_B = self.cut.positions(micro_step, self.rank)
        if self.corpora.is_remote:
            self.corpora.keep_open(self.order.shards_from(int(positions_B[0]), 2))
        located = self._locate(micro_step)
        positions, shards = positions_B.tolist(), located.shard.tolist()
        # All pairs are read before the first is decoded, so that decoding keeps its working set in the CPU's caches.
        pairs = [self._try_read(shard, number) for shard, number in zip(shards, located.pair.tolist(), strict=True)]
        return positions_B, [
            self._decode_or_replace(position, shard, pair, None if outs is None else outs[row])
            for row, (position, shard, pair) in enumerate(zip(positions, shards, pairs, strict=True))
        ]

    def _locate(self, micro_step: int) -> Located:
        """Find the pairs of a micro-batch, together with those of the following ones of this worker."""
        size = self.cut.micro_batch_size
        if self._located is None or micro_step not in self._located[0]:
            # DataLoader gives a worker every n-th micro-batch. They are located for at most an epoch ahead, as each
            # epoch has to be planned.
            stride = max(1, self.config.workers)
            per_epoch = self.order.num_pairs // (stride * size * self.cut.world_size)
            count = max(1, min(_LOCATED_TOGETHER // size, per_epoch))
            steps = range(micro_step, micro_step + stride * count, stride)
            positions = np.concatenate([self.cut.positions(step, self.rank) for step in steps])
            self._located = steps, self.order.locate(positions)
        row = self._located[0].index(micro_step) * size
        return Located(*(array[row : row + size] for array in self._located[1]))

    def _try_read(self, shard: int, number: int) -> Pair | DataError:
        """Read a pair from its shard. Returns: the pair, or the error."""
        try:
            return self.corpora.read(shard, number)
        except DataError as error:
            return error

    def _decode_or_replace(self, position: int, shard: int, pair: Pair | DataError, out: Tensor | None) -> Loaded:
        """Decode a pair, or return a replacement from the same corpus, which depends only on seed and position."""
        try:
            if isinstance(pair, DataError):
                raise pair
            return self._decode(position, pair, out)
        except DataError as error:
            if self.config.on_bad_sample == "fail":
                raise
            corpus = self.corpora.corpus_of_shard[shard]
            for attempt in range(_TRIES):
                drawn = rng.below(
                    rng.key(self.seed, "substitute", attempt), position, self.corpora.pairs_of_corpus(corpus)
                )
                try:
                    other = self.corpora.read(*self.corpora.pair_of_corpus(corpus, int(drawn)))
                    loaded = self._decode(position, other, out)
                except DataError:
                    continue
                return loaded._replace(replaced=f"position {position}: {error} {loaded.pair.where} replaces it.")
            raise DataError(
                f"A pair and {_TRIES} replacements from {self.corpora.names[corpus]} cannot be read: {error}"
            ) from error


class PretrainStream(PairStream[PretrainBatch]):
    """Pretraining pairs, with the masks of MLM and the negatives of ITM."""

    config: DataConfig

    def __init__(
        self,
        corpora: Corpora,
        order: Order,
        cut: Cut,
        config: DataConfig,
        *,
        rank: int,
        seed: int,
        tokenizer: Tokenizer,
        image_size_px: int,
        max_text_tokens: int,
        mlm_probability: float,
    ) -> None:
        """Describe the stream; nothing is read yet."""
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
        self.mlm_probability = mlm_probability
        self.max_images = cut.micro_batch_size * (1 if config.itm_negatives == "group" else 2)

    def read_into(self, pixels: Tensor, micro_step: int) -> PretrainBatch:
        """Read, decode and collate one micro-batch, with its images in the first rows of ``pixels``."""
        drawn = self.draw(micro_step, pixels)
        image_id_B = np.array([one.pair.image_id for one in drawn.pairs], np.uint64)
        weight_M = choices.mlm_weights(
            drawn.masked.index_M, drawn.ids_BL.shape[1], len(drawn.pairs), self.config.negative_group_size
        )
        is_token_BL = drawn.ids_BL != self.tokenizer.pad_id
        num_masked_B = np.bincount(drawn.masked.index_M // drawn.ids_BL.shape[1], minlength=len(drawn.pairs))
        return PretrainBatch(
            pixels_N3SS=pixels[: len(drawn.images)],
            clean_ids_BL=torch.from_numpy(drawn.ids_BL),
            masked_ids_BL=torch.from_numpy(drawn.masked.ids_BL),
            attention_mask_BL=torch.from_numpy(is_token_BL),
            mlm_index_M=torch.from_numpy(drawn.masked.index_M),
            mlm_label_M=torch.from_numpy(drawn.masked.label_M),
            mlm_weight_M=torch.from_numpy(weight_M),
            itm_image_B=torch.from_numpy(drawn.choice.image_B),
            itm_label_B=torch.from_numpy(drawn.choice.label_B),
            image_id_B=torch.from_numpy(as_int64(image_id_B)),
            corpus_B=torch.tensor([one.pair.corpus for one in drawn.pairs]),
            num_tokens=tuple(is_token_BL.sum(axis=1).tolist()),
            num_masked=tuple(num_masked_B.tolist()),
            replaced_B=torch.tensor([bool(one.replaced) for one in drawn.pairs]),
            notes=tuple(one.replaced for one in drawn.images if one.replaced),
            lines=tuple(self.describe_pairs(micro_step, drawn)) if self.config.record_pairs else (),
        )

    def draw(self, micro_step: int, pixels: Tensor | None = None) -> MicroBatch:
        """Read one micro-batch and make its random choices.

        Args:
            micro_step: counted from the start of the run.
            pixels: tensor that images are decoded into; None does not decode, so that damaged images go unnoticed.
        """
        positions_B, pairs = self._read(micro_step, pixels)
        ids_BL = pad(
            self.tokenizer.encode([one.pair.caption for one in pairs], self.max_text_tokens), self.tokenizer.pad_id
        )
        masked = choices.mask_tokens(
            ids_BL,
            positions_B,
            self.tokenizer,
            stream=rng.key(self.seed, "mlm"),
            probability=self.mlm_probability,
        )
        if self.config.itm_negatives == "corpus":
            choice, negatives = self._negatives_of_corpus(positions_B, pairs, pixels)
        else:
            negatives = []
            choice = choices.choose_images(
                np.array([one.pair.image_id for one in pairs], np.uint64),
                np.array([one.pair.corpus for one in pairs]),
                positions_B,
                seed=self.seed,
                group_size=self.config.negative_group_size,
            )
        return MicroBatch(positions_B, pairs, negatives, ids_BL, masked, choice)

    def _decode(self, position: int, pair: Pair, out: Tensor | None) -> Loaded:
        if out is not None:
            load_image(pair.image, self.image_size_px, pair.where, exact=self.config.exact_resize, out=out)
        return Loaded(pair, "")

    def _negatives_of_corpus(
        self, positions_B: I64, pairs: list[Loaded], pixels: Tensor | None
    ) -> tuple[choices.ImageChoice, list[Loaded]]:
        """Draw each negative from the whole corpus, as published, but never the same image.

        A pair for which all draws give its own image stays a positive.
        """
        wants_negative_B = choices.wants_negative(
            positions_B, seed=self.seed, group_size=self.config.negative_group_size
        )
        image_B, label_B = np.arange(len(pairs)), np.ones(len(pairs), np.int64)
        negatives: list[Loaded] = []
        for row in np.flatnonzero(wants_negative_B).tolist():
            pair, position = pairs[row].pair, int(positions_B[row])
            for attempt in range(_TRIES):
                stream = rng.key(self.seed, "itm of corpus", attempt)
                drawn = int(rng.below(stream, position, self.corpora.pairs_of_corpus(pair.corpus)))
                shard, number = self.corpora.pair_of_corpus(pair.corpus, drawn)
                if self.corpora.read_image_id(shard, number) != pair.image_id:
                    image_B[row], label_B[row] = len(pairs) + len(negatives), 0
                    out = None if pixels is None else pixels[int(image_B[row])]
                    negatives.append(self._decode_or_replace(position, shard, self._try_read(shard, number), out))
                    break
        return choices.ImageChoice(image_B, label_B), negatives

    def describe_pairs(self, micro_step: int, drawn: MicroBatch) -> list[str]:
        """Return a line of JSON for each pair: what the model is given at this position."""
        keys = [self.corpora.reader(one.pair.shard).key(one.pair.sample) for one in drawn.images]
        masked: list[list[int]] = [[] for _ in drawn.pairs]
        width = drawn.ids_BL.shape[1]
        for index in drawn.masked.index_M.tolist():
            masked[index // width].append(index % width)
        lines = []
        for row, one in enumerate(drawn.pairs):
            position, label = int(drawn.positions_B[row]), int(drawn.choice.label_B[row])
            line = {
                "step": position // self.cut.global_batch_size + 1,
                "position": position,
                "epoch": position // self.order.num_pairs,
                "rank": self.rank,
                "micro_step": micro_step,
                "shard": str(self.corpora.shard_paths[one.pair.shard]),
                "key": keys[row],
                "image_id": one.pair.record["image_id"],
                "caption": one.pair.caption,
                "masked": masked[row],
                "itm_label": label,
                "negative_key": None if label else keys[int(drawn.choice.image_B[row])],
            }
            if one.replaced:
                line["replaced"] = one.replaced
            lines.append(json.dumps(line, ensure_ascii=False))
        return lines
