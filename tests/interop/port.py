"""Models of Hugging Face's port with random weights, and what they compute of a batch of ragged texts.

Shapes: B pairs, L text tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerTextConfig,
    BridgeTowerVisionConfig,
)

from bridgetower.model.bridgetower import BridgeTower


def port_config(
    *,
    width: int = 128,
    layers: int = 4,
    bridged: int = 3,
    patch: int = 8,
    image: int = 24,
    heads: int | None = None,
    vision_width: int | None = None,
    vocabulary: int = 50,
    positions: int = 20,
    **options: Any,
) -> BridgeTowerConfig:
    """Sizes, and options of the configuration: text_x, vision_x, or x of the whole."""
    text = BridgeTowerTextConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads or width // 64,
            "intermediate_size": 4 * width,
            "max_position_embeddings": positions,
            **{name.removeprefix("text_"): value for name, value in options.items() if name.startswith("text_")},
        }
    )
    vision = BridgeTowerVisionConfig(
        **{
            "hidden_size": vision_width or width,
            "num_hidden_layers": layers,
            "patch_size": patch,
            "image_size": image,
            **{name.removeprefix("vision_"): value for name, value in options.items() if name.startswith("vision_")},
        }
    )
    whole = {name: value for name, value in options.items() if not name.startswith(("text_", "vision_"))}
    return BridgeTowerConfig(
        **{
            "hidden_size": width,
            "num_attention_heads": heads or width // 64,
            "num_hidden_layers": bridged,
            "text_config": text.to_dict(),
            "vision_config": vision.to_dict(),
            **whole,
        }
    )


_MANY = 1_000_003


def fill(module: nn.Module, std: float, seed: int = 0) -> None:
    """Random weights in place: matrices from N(0, std), vectors with values of their own, norms near 1."""
    rng = torch.Generator().manual_seed(seed)
    # To draw 900 million numbers takes ten seconds: large tensors have the same ones over and over, each from another
    # place on. It is a prime number of them, so that they fall differently in every row and every part of a tensor.
    numbers = torch.randn(_MANY, generator=rng)
    with torch.no_grad():
        for place, (name, parameter) in enumerate(module.named_parameters()):
            if parameter.numel() < _MANY:
                parameter.normal_(generator=rng)
            else:
                repeated = numbers.roll(1_009 * place).repeat(-(-parameter.numel() // _MANY))
                parameter.copy_(repeated[: parameter.numel()].view_as(parameter))
            is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
            if is_norm_scale:
                parameter.mul_(0.1).add_(1.0)
            else:
                parameter.mul_(0.1 if parameter.ndim == 1 else std)


class Port(NamedTuple):
    """Both classes with heads, on one backbone."""

    masked_lm: Any
    retrieval: Any

    def parameters(self) -> dict[str, Tensor]:
        """By the names of both classes."""
        return {**dict(self.masked_lm.named_parameters()), **dict(self.retrieval.named_parameters())}


def build_port(config: BridgeTowerConfig, std: float = 0.05) -> Port:
    """Float32, evaluation mode."""
    with mock.patch.multiple(torch.Tensor, normal_=_as_it_is, uniform_=_as_it_is):  # all are filled below
        masked_lm = BridgeTowerForMaskedLM(config).eval()
    retrieval = BridgeTowerForImageAndTextRetrieval.__new__(BridgeTowerForImageAndTextRetrieval)
    # A second backbone of a large model is 3.5 GB that nobody reads.
    retrieval.__dict__.update(BridgeTowerForImageAndTextRetrieval(_smallest(config)).__dict__)
    retrieval.config = config
    retrieval.bridgetower = masked_lm.bridgetower
    retrieval.itm_score.fc = nn.Linear(2 * config.hidden_size, 2)
    fill(masked_lm, std)
    fill(retrieval.itm_score, std, seed=1)
    return Port(masked_lm, retrieval.eval())


def _as_it_is(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def _smallest(config: BridgeTowerConfig) -> BridgeTowerConfig:
    return port_config(width=64, layers=1, bridged=1)


class Batch(NamedTuple):
    pixels: Tensor
    ids: Tensor
    mask: Tensor
    words: Tensor
    """MLM's labels; -100 where nothing is asked."""
    matches: Tensor


def ragged_batch(config: BridgeTowerConfig, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    vocabulary, side = config.text_config.vocab_size, config.vision_config.image_size
    ids = torch.randint(5, vocabulary, (rows, longest), generator=rng)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    asked = mask & (torch.rand(rows, longest, generator=rng) < 0.4)
    asked[:, 1] = True
    words = torch.randint(5, vocabulary, (rows, longest), generator=rng).masked_fill(~asked, -100)
    pixels = torch.randn(rows, 3, side, side, generator=rng)
    return Batch(pixels, ids.masked_fill(~mask, 1), mask, words, torch.arange(rows) % 2)


class Numbers(NamedTuple):
    """What is compared. States of padding are not: nothing reads them."""

    text: Tensor
    image: Tensor
    pooled: Tensor
    word_logits: Tensor
    match_logits: Tensor
    loss: Tensor


def numbers_of_port(port: Port, batch: Batch) -> Numbers:
    """One run of the backbone, and the heads as their classes call them."""
    output = port.masked_lm.bridgetower(
        pixel_values=batch.pixels, input_ids=batch.ids, attention_mask=batch.mask.long()
    )
    return _numbers(
        output.text_features,
        output.image_features,
        output.pooler_output,
        port.masked_lm.mlm_score(output.text_features),
        port.retrieval.itm_score(output.pooler_output),
        batch,
    )


def numbers_of_ours(model: BridgeTower, batch: Batch) -> Numbers:
    output = model(batch.pixels, batch.ids, batch.mask)
    words, matches = model.mlm_logits(output), model.itm_logits(output)
    return _numbers(output.text_states, output.image_states, output.pooled, words, matches, batch)


def _numbers(text: Tensor, image: Tensor, pooled: Tensor, words: Tensor, matches: Tensor, batch: Batch) -> Numbers:
    loss = F.cross_entropy(words.flatten(0, 1), batch.words.flatten()) + F.cross_entropy(matches, batch.matches)
    return Numbers(text[batch.mask], image, pooled, words[batch.mask], matches, loss)


def differences(one: Numbers, other: Numbers) -> dict[str, float]:
    """The largest one of each."""
    return {name: float((value - getattr(other, name)).abs().max().detach()) for name, value in one._asdict().items()}


def gradient_fault(name: str, found: Tensor, expected: Tensor, largest: float) -> tuple[float, float]:
    """The relative difference of two gradients, and its limit.

    The gradient of a key's bias is 0, as it adds the same to all scores of a query. What is there is rounding, which is
    compared with the largest gradient of all. (In CLIP's joint projection it is a third of a tensor that is not 0.)

    Args:
        largest: norm of any tensor's gradient.
    """
    if name.endswith("key.bias"):
        return float(found.norm() + expected.norm()) / largest, 1e-6
    return float((found - expected).norm() / expected.norm()), 1e-4
