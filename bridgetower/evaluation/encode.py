"""The images and captions of a held-out split, each encoded once by one of the ranks.

Images are cut into blocks of ``batch_size``, and each block belongs to one rank, which also scores every pair with one
of its images. Blocks do not depend on the number of ranks, so neither do the scores. A caption may be paired with any
image, so every rank holds the states of all captions: 1 GB for 5,000 captions of the base model in bf16.

Shapes: N images and T captions of the split, B images of a block, L tokens, P image positions, R pairs,
K bridged layers, D width, C contrastive width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bridgetower import dist
from bridgetower.evaluation.scorer import F32, I64, ScoringContext

Value = TypeVar("Value")


class EncodedCaptions(NamedTuple):
    """All captions of the split, on every rank."""

    states_KTLD: Tensor
    """Padded to the longest caption."""
    mask_TL: Tensor
    """True for real tokens."""
    embedding_TC: F32 | None
    """Unit vectors for retrieval by ITC; None without ITC."""


class EncodedImages(NamedTuple):
    """The images of the split."""

    states_by_block: dict[int, Tensor]
    """States (K, B, P, D) of this rank's blocks, by the number of each block's first image."""
    embedding_NC: F32 | None
    """Unit vectors of all images, on every rank; None without ITC."""


def encode_captions(context: ScoringContext) -> EncodedCaptions:
    """Encode the captions, a batch per rank in turn, and send each batch to all ranks."""
    scorer, split, device = context.scorer, context.split, context.device
    states, masks, embeddings = [], [], []
    for index, first in enumerate(range(0, split.num_captions, context.batch_size)):
        batch = split.text_batch(first, context.batch_size, seed=context.seed)
        mask_TL = batch.attention_mask_TL.to(device)
        masks.append(mask_TL)
        owner = index % dist.world_size()
        encoded = scorer.text_features(batch.clean_ids_TL.to(device), mask_TL) if owner == dist.rank() else None
        states.append(dist.from_rank(owner, None if encoded is None else encoded.states_KBND, device))
        if scorer.objectives.itc:
            embedding = dist.from_rank(owner, None if encoded is None else encoded.embedding_BC, device)
            embeddings.append(embedding.float().cpu().numpy())
    longest = max(mask.shape[1] for mask in masks)
    return EncodedCaptions(
        torch.cat([F.pad(batch, (0, 0, 0, longest - batch.shape[2])) for batch in states], dim=1),
        torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]),
        np.concatenate(embeddings) if embeddings else None,
    )


def encode_images(context: ScoringContext) -> EncodedImages:
    """Encode this rank's blocks of images, and gather the embeddings of all."""
    states_by_block: dict[int, Tensor] = {}
    embeddings: dict[int, F32] = {}
    blocks = range(0, context.split.num_images, context.batch_size)
    for first in blocks[dist.rank() :: dist.world_size()]:
        pixels_N3SS = context.split.image_batch(first, context.batch_size).pixels_N3SS
        encoded = context.scorer.image_features(pixels_N3SS.to(context.device))
        states_by_block[first] = encoded.states_KBND
        if encoded.embedding_BC is not None:
            embeddings[first] = encoded.embedding_BC.float().cpu().numpy()
    if not context.scorer.objectives.itc:
        return EncodedImages(states_by_block, None)
    embeddings = merge(dist.gather_objects(embeddings))
    return EncodedImages(states_by_block, np.concatenate([embeddings[first] for first in blocks]))


def select_images(states_KBPD: Tensor, image_R: I64) -> tuple[Tensor, Tensor]:
    """Select the images of some pairs, each once.

    Args:
        image_R: image of each pair, a row of ``states_KBPD``.

    Returns: the states of the images (K, N, P, D), and for each pair the row of its image in them.
    """
    images_N, rows_R = np.unique(image_R, return_inverse=True)
    device = states_KBPD.device
    return states_KBPD[:, torch.from_numpy(images_N).to(device)], torch.from_numpy(rows_R).to(device)


def merge(by_rank: Iterable[Mapping[int, Value]]) -> dict[int, Value]:
    """Join the ranks' results, which are kept by the number of a block or caption."""
    return {number: value for results in by_rank for number, value in results.items()}
