"""The streams of training micro-batches: numbers in, batches out, as a pure function.

What a pair is, where it stands, what is masked in its caption and which image it is shown with depend on the seed and
its position alone: not on ranks, workers, or where a run was stopped.
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
from bridgetower.data import choices as collate
from bridgetower.data.corpora import Corpora, Pair, as_int64
from bridgetower.data.images import load_image
from bridgetower.data.order import Cut, Located, Order
from bridgetower.data.text import Tokenizer, pad
from bridgetower.errors import DataError

I64 = npt.NDArray[np.int64]
Batch = TypeVar("Batch", PretrainBatch, FinetuneBatch)

# Pairs that are tried in the place of one that cannot be read, or of a negative that is the picture itself.
_TRIES = 8
# Pairs that are looked up together: 8,192 take NumPy 7.6 ms, 32 of them 6.6 ms.
_LOOK_UP_TOGETHER = 8_192


class Loaded(NamedTuple):
    """A pair that was read."""

    pair: Pair
    replaced: str
    """Why another pair's place was taken; empty for nearly all."""


class MicroBatch(NamedTuple):
    """A micro-batch with every random choice made, before it becomes tensors. B pairs, L tokens."""

    positions_B: I64
    pairs: list[Loaded]
    negatives: list[Loaded]
    """Images that are there as negatives alone (data.itm_negatives=corpus)."""
    ids_BL: I64
    masked: collate.MaskedTokens
    choice: collate.ImageChoice
    """Rows of ``pairs`` followed by ``negatives``."""

    @property
    def images(self) -> list[Loaded]:
        """What is decoded, row by row."""
        return [*self.pairs, *self.negatives]


class PairStream(Dataset[Batch], Generic[Batch]):
    """Micro-batch n of one rank, as a pure function of n: what streams of all kinds have in common."""

    max_images: int
    """Most images of a micro-batch."""

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
        self._found: tuple[range, Located] | None = None

    def __getitem__(self, micro_step: int) -> Batch:
        """Read, decode and collate one micro-batch. Micro-steps count from the start of the run.

        Raises:
            DataError: a pair cannot be read, and data.on_bad_sample=fail.
        """
        side = self.image_size_px
        return self.into(torch.empty(self.max_images, 3, side, side, dtype=torch.uint8), micro_step)

    @abstractmethod
    def into(self, pixels: Tensor, micro_step: int) -> Batch:
        """The same, with the images in the first rows of a tensor that is there already."""

    @abstractmethod
    def _decode(self, position: int, pair: Pair, out: Tensor | None) -> Loaded:
        """Decode what is seen of a pair.

        Args:
            out: where to; None only if it need not be looked at.

        Raises:
            DataError: it cannot be decoded.
        """

    def _read(self, micro_step: int, outs: Tensor | Sequence[Tensor] | None) -> tuple[I64, list[Loaded]]:
        """The pairs of a micro-batch and their positions, decoded into ``outs`` if it is there."""
        positions_B = self.cut.positions(micro_step, self.rank)
        if self.corpora.is_remote:
            self.corpora.keep_open(self.order.shards_of(int(positions_B[0]), 2))
        located = self._locate(micro_step)
        # All are read before the first is decoded: what decoding works with then stays in the processor's caches.
        places = list(zip(positions_B.tolist(), located.shard.tolist(), located.pair.tolist(), strict=True))
        found = [self._find(shard, number) for _, shard, number in places]
        return positions_B, [
            self._complete(position, shard, one, None if outs is None else outs[row])
            for row, ((position, shard, _), one) in enumerate(zip(places, found, strict=True))
        ]

    def _locate(self, micro_step: int) -> Located:
        """Where the pairs of a micro-batch lie."""
        size = self.cut.micro_batch_size
        if self._found is None or micro_step not in self._found[0]:
            # A worker is given every so many micro-batches. Not far beyond an epoch, as each has to be planned.
            stride = max(1, self.config.workers)
            per_epoch = self.order.num_pairs // (stride * size * self.cut.world_size)
            count = max(1, min(_LOOK_UP_TOGETHER // size, per_epoch))
            steps = range(micro_step, micro_step + stride * count, stride)
            positions = np.concatenate([self.cut.positions(step, self.rank) for step in steps])
            self._found = steps, self.order.locate(positions)
        row = self._found[0].index(micro_step) * size
        return Located(*(part[row : row + size] for part in self._found[1]))

    def _find(self, shard: int, number: int) -> Pair | DataError:
        """Read a pair from its shard, or say why not."""
        try:
            return self.corpora.read(shard, number)
        except DataError as error:
            return error

    def _complete(self, position: int, shard: int, found: Pair | DataError, out: Tensor | None) -> Loaded:
        """Decode a pair's image, or give the pair that takes its place."""
        try:
            if isinstance(found, DataError):
                raise found
            return self._decode(position, found, out)
        except DataError as error:
            if self.config.on_bad_sample == "fail":
                raise
            corpus = self.corpora.corpus_of_shard[shard]
            for attempt in range(_TRIES):
                drawn = rng.below(
                    rng.key(self.seed, "substitute", attempt), position, self.corpora.pairs_of_corpus(corpus)
                )
                try:
                    pair = self.corpora.read(*self.corpora.pair_of_corpus(corpus, int(drawn)))
                    loaded = self._decode(position, pair, out)
                except DataError:
                    continue
                return loaded._replace(replaced=f"position {position}: {error} {loaded.pair.where} took its place.")
            raise DataError(
                f"Nor can {_TRIES} others of {self.corpora.names[corpus]} be read in place of a pair: {error}"
            ) from error


class PretrainStream(PairStream[PretrainBatch]):
    """Pairs with everything random that MLM, ITM and ITC need."""

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

    def into(self, pixels: Tensor, micro_step: int) -> PretrainBatch:
        """The same, with the images in the first rows of a tensor that is there already."""
        drawn = self.draw(micro_step, pixels)
        image_id_B = np.array([one.pair.image_id for one in drawn.pairs], np.uint64)
        weight_M = collate.mlm_weights(
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
        """Read one micro-batch and make its choices.

        Args:
            pixels: where images are decoded to; without it, one that cannot be decoded is not noticed.
        """
        positions_B, pairs = self._read(micro_step, pixels)
        ids_BL = pad(
            self.tokenizer.encode([one.pair.caption for one in pairs], self.max_text_tokens), self.tokenizer.pad_id
        )
        masked = collate.mask_tokens(
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
            choice = collate.choose_images(
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
    ) -> tuple[collate.ImageChoice, list[Loaded]]:
        """As published: the negative is a pair drawn from all of the corpus. But never the picture itself."""
        wants_negative_B = collate.wants_negative(
            positions_B, seed=self.seed, group_size=self.config.negative_group_size
        )
        image_B, label_B = np.arange(len(pairs)), np.ones(len(pairs), np.int64)
        negatives: list[Loaded] = []
        for row in np.flatnonzero(wants_negative_B).tolist():
            own, position = pairs[row].pair, int(positions_B[row])
            for attempt in range(_TRIES):
                stream = rng.key(self.seed, "itm of corpus", attempt)
                drawn = int(rng.below(stream, position, self.corpora.pairs_of_corpus(own.corpus)))
                shard, number = self.corpora.pair_of_corpus(own.corpus, drawn)
                if self.corpora.read_image_id(shard, number) != own.image_id:
                    image_B[row], label_B[row] = len(pairs) + len(negatives), 0
                    out = None if pixels is None else pixels[int(image_B[row])]
                    negatives.append(self._complete(position, shard, self._find(shard, number), out))
                    break
        return collate.ImageChoice(image_B, label_B), negatives

    def describe_pairs(self, micro_step: int, drawn: MicroBatch) -> list[str]:
        """A JSON text for each pair: what the model is given at this position."""
        keys = [self.corpora.reader(one.pair.shard).key(one.pair.sample) for one in drawn.images]
        masked: list[list[int]] = [[] for _ in drawn.pairs]
        width = drawn.ids_BL.shape[1]
        for index in drawn.masked.index_M.tolist():
            masked[index // width].append(index % width)
        result = []
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
            result.append(json.dumps(line, ensure_ascii=False))
        return result
