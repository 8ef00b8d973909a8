"""What a model can read: tensors of the wrong shape, type or size are refused with what to do instead.

Shapes: K bridged layers, B pairs, L text tokens, P image positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bridgetower.config.model import FusionConfig, ModelConfig, TextTowerConfig
from bridgetower.errors import DataError


def check_pixels(pixels: Tensor, config: ModelConfig, dtype: torch.dtype) -> None:
    """Raise DataError unless pixels are normalised images of the model's size, in the dtype of its weights."""
    side, patch = config.image_size_px, config.vision.patch_size_px
    if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or not len(pixels):
        given = tuple(pixels.shape)
        if len(given) != 4 or given[1] != 3 or not given[0]:
            suggestion = "Give one or more RGB images, channels before height and width."
        elif given[2] != given[3] or not given[3] or given[3] % patch:
            suggestion = f"Resize the images to {side} x {side} pixels."
        else:
            suggestion = f"Resize the images, or load the model with image_size_px={given[3]}."
        raise DataError(f"pixel_values have shape {given}, the model reads (pairs, 3, {side}, {side}). {suggestion}")
    if not pixels.is_floating_point():
        raise DataError(
            f"pixel_values are {pixels.dtype}, the model reads normalised floating-point pixels. "
            "Call model.normalize on uint8 ones."
        )
    if pixels.dtype != dtype and not torch.is_autocast_enabled(pixels.device.type):
        raise DataError(
            f"pixel_values are {pixels.dtype}, the weights are {dtype}. Use pixel_values.to({dtype}), or "
            "torch.autocast."
        )


def check_ids(ids: Tensor, longest_text: int) -> None:
    """Raise DataError unless ids are whole numbers of shape (pairs, tokens), no text longer than the longest."""
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise DataError(
            f"input_ids have shape {tuple(ids.shape)} and type {ids.dtype}, the model reads whole numbers (int64) "
            "of shape (pairs, tokens). Give the tokenizer's ids, one row per text."
        )
    if ids.shape[1] > longest_text:
        raise DataError(
            f"input_ids have {ids.shape[1]} tokens, the text tower has positions for {longest_text}. "
            "Cut the texts to so many."
        )


def check_vocabulary(ids: Tensor, config: TextTowerConfig) -> None:
    """Raise DataError if the vocabulary lacks an id; on a GPU this makes the host wait."""
    lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest < 0 or highest >= config.vocabulary_size:
        raise DataError(
            f"input_ids hold {lowest if lowest < 0 else highest}, the vocabulary has ids from 0 to "
            f"{config.vocabulary_size - 1}. Use the tokenizer that the model was trained with "
            f"({config.tokenizer})."
        )


def check_states(text_KBLD: Tensor, image_KBPD: Tensor, fusion: FusionConfig, dtype: torch.dtype) -> None:
    """Raise DataError unless states are those of the bridged layers, of as many texts as images."""
    text, image = tuple(text_KBLD.shape), tuple(image_KBPD.shape)
    layers = max(1, fusion.num_bridged)
    for name, states in (("text", text_KBLD), ("image", image_KBPD)):
        shape = tuple(states.shape)
        if len(shape) != 4 or shape[0] != layers or shape[3] != fusion.width:
            raise DataError(
                f"The {name} states have shape {shape}, the cross-modal encoder reads ({layers}, pairs, positions, "
                f"{fusion.width}). Give it states_KBND of encode_{name}."
            )
        if states.dtype != dtype and not torch.is_autocast_enabled(states.device.type):
            raise DataError(
                f"The {name} states are {states.dtype}, the weights are {dtype}. Use states_KBND.to({dtype}), or "
                "torch.autocast."
            )
    if text[1] != image[1]:
        raise DataError(
            f"There are states of {image[1]} images and {text[1]} texts; row b of both is one pair. Repeat or "
            "choose rows: states_KBND[:, rows]."
        )


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raise DataError unless a mask has a value per token and cannot be mistaken for one that is added to scores."""
    if tuple(mask.shape) != tuple(shape):
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, the tokens {tuple(shape)}. Give one value per token: "
            "non-zero for real ones, 0 for padding."
        )
    if mask.is_floating_point():
        raise DataError(
            f"attention_mask is {mask.dtype}. Masks of that type are as often 0 for real tokens (those that are added "
            "to scores) as for padding. Give booleans or whole numbers, non-zero for real tokens: mask.bool() or "
            "mask == 0."
        )
