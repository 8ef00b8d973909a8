"""Models of Hugging Face's port with random weights, and the outputs of both sides on captions of several lengths.

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
    """Build a configuration from sizes and options: text_x and vision_x are the towers' x, others the whole model's."""
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


_NUM_DRAWN = 1_000_003
"""A prime, so that the repeated numbers fall differently in every row and tensor."""


def fill(module: nn.Module, std: float, seed: int = 0) -> None:
    """Fill with random weights in place: matrices from N(0, std), norm scales near 1, other vectors from N(0, 0.1)."""
    rng = torch.Generator().manual_seed(seed)
    # Drawing 900 million numbers takes ten seconds, so large tensors repeat a million, each from another offset.
    numbers = torch.randn(_NUM_DRAWN, generator=rng)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(module.named_parameters()):
            if parameter.numel() < _NUM_DRAWN:
                parameter.normal_(generator=rng)
            else:
                repeated = numbers.roll(1_009 * index).repeat(-(-parameter.numel() // _NUM_DRAWN))
                parameter.copy_(repeated[: parameter.numel()].view_as(parameter))
            is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
            if is_norm_scale:
                parameter.mul_(0.1).add_(1.0)
            else:
                parameter.mul_(0.1 if parameter.ndim == 1 else std)


class Port(NamedTuple):
    """Both of the port's classes with heads, sharing one backbone."""

    masked_lm: Any
    retrieval: Any

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters of both classes by their names."""
        return {**dict(self.masked_lm.named_parameters()), **dict(self.retrieval.named_parameters())}


def build_port(config: BridgeTowerConfig, std: float = 0.05) -> Port:
    """Build both classes in float32 and evaluation mode, with random weights."""
    # All are filled below, so transformers need not draw initial values.
    with mock.patch.multiple(torch.Tensor, normal_=_leave_unchanged, uniform_=_leave_unchanged):
        masked_lm = BridgeTowerForMaskedLM(config).eval()
    retrieval = BridgeTowerForImageAndTextRetrieval.__new__(BridgeTowerForImageAndTextRetrieval)
    # A second backbone of a large model would be 3.5 GB that nothing reads.
    retrieval.__dict__.update(BridgeTowerForImageAndTextRetrieval(port_config(width=64, layers=1, bridged=1)).__dict__)
    retrieval.config = config
    retrieval.bridgetower = masked_lm.bridgetower
    retrieval.itm_score.fc = nn.Linear(2 * config.hidden_size, 2)
    fill(masked_lm, std)
    fill(retrieval.itm_score, std, seed=1)
    return Port(masked_lm, retrieval.eval())


def _leave_unchanged(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


class Batch(NamedTuple):
    """Images, padded captions and their labels."""

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    words: Tensor
    """MLM labels; -100 at tokens that are not to be predicted."""
    matches: Tensor
    """ITM labels, 1 for a true pair."""


def ragged_batch(config: BridgeTowerConfig, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Draw a batch with captions of these lengths, padded to the longest. Each has at least one label for MLM."""
    rng = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    vocabulary, side = config.text_config.vocab_size, config.vision_config.image_size
    ids = torch.randint(5, vocabulary, (rows, longest), generator=rng)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    is_predicted = mask & (torch.rand(rows, longest, generator=rng) < 0.4)
    is_predicted[:, 1] = True
    words = torch.randint(5, vocabulary, (rows, longest), generator=rng).masked_fill(~is_predicted, -100)
    pixels = torch.randn(rows, 3, side, side, generator=rng)
    return Batch(pixels, ids.masked_fill(~mask, 1), mask, words, torch.arange(rows) % 2)


class Numbers(NamedTuple):
    """Outputs to compare, without the states of padding, which nothing reads."""

    text: Tensor
    image: Tensor
    pooled: Tensor
    word_logits: Tensor
    match_logits: Tensor
    loss: Tensor


def numbers_of_port(port: Port, batch: Batch) -> Numbers:
    """Run the port's backbone once, and its heads as their classes call them."""
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
    """Run this program's model once, and its heads."""
    output = model(batch.pixels, batch.ids, batch.mask)
    words, matches = model.mlm_logits(output), model.itm_logits(output)
    return _numbers(output.text_states, output.image_states, output.pooled, words, matches, batch)


def _numbers(text: Tensor, image: Tensor, pooled: Tensor, words: Tensor, matches: Tensor, batch: Batch) -> Numbers:
    loss = F.cross_entropy(words.flatten(0, 1), batch.words.flatten()) + F.cross_entropy(matches, batch.matches)
    return Numbers(text[batch.mask], image, pooled, words[batch.mask], matches, loss)


def differences(one: Numbers, other: Numbers) -> dict[str, float]:
    """Return the largest absolute difference of each output."""
    return {name: float((value - getattr(other, name)).abs().max().detach()) for name, value in one._asdict().items()}


def gradient_fault(name: str, gradient: Tensor, expected: Tensor, largest_norm: float) -> tuple[float, float]:
    """Return the relative difference of two gradients, and its limit.

    The gradient of a key bias is 0, because the bias cancels in the softmax. Only rounding is left, which is compared
    with the largest gradient. (In CLIP's joint projection the key bias is a third of a tensor that is not 0.)

    Args:
        largest_norm: norm of the largest gradient of any tensor.
    """
    if name.endswith("key.bias"):
        return float(gradient.norm() + expected.norm()) / largest_norm, 1e-6
    return float((gradient - expected).norm() / expected.norm()), 1e-4
