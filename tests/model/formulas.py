"""The cross-modal part as in reference_spec 1.5 and 1.6 and the paper's Table 1, sharing no code with the model.

It computes one pair, one head and one matmul at a time, in the precision of its inputs.

Shapes: N positions, M positions attended to, D width, L text tokens, P image positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BRIDGE_EPS = 1e-5


class Formulas:
    """The formulas, with the parameters of a module looked up by name."""

    def __init__(self, module: nn.Module, num_heads: int, layer_eps: float, masks_padding: bool = True) -> None:
        self.weights = {name: value.detach() for name, value in module.named_parameters()}
        self.num_heads, self.layer_eps, self.masks_padding = num_heads, layer_eps, masks_padding

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("nd,ed->ne", x, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return (x - mean) / torch.sqrt(variance + eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def probabilities(self, x: Tensor, context: Tensor, mask: Tensor, name: str) -> list[Tensor]:
        """Return attention probabilities, one matrix (N, M) per head."""
        query, key = self.linear(x, f"{name}.query"), self.linear(context, f"{name}.key")
        size = x.shape[-1] // self.num_heads
        matrices = []
        for head in range(self.num_heads):
            channels = slice(head * size, (head + 1) * size)
            weights = torch.exp(query[:, channels] @ key[:, channels].T / math.sqrt(size)) * mask.to(x.dtype)
            matrices.append(weights / weights.sum(-1, keepdim=True))
        return matrices

    def attention(self, x: Tensor, context: Tensor, mask: Tensor, name: str) -> Tensor:
        value = self.linear(context, f"{name}.value")
        size = x.shape[-1] // self.num_heads
        heads = [
            matrix @ value[:, head * size : (head + 1) * size]
            for head, matrix in enumerate(self.probabilities(x, context, mask, name))
        ]
        return self.norm(x + self.linear(torch.cat(heads, dim=-1), f"{name}.output"), f"{name}.norm", self.layer_eps)

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        inner = gelu(self.linear(x, f"{name}.expand"))
        return self.norm(x + self.linear(inner, f"{name}.contract"), f"{name}.norm", self.layer_eps)

    def layer(self, x: Tensor, x_mask: Tensor, other: Tensor, other_mask: Tensor, name: str) -> Tensor:
        a = self.attention(x, x, x_mask, f"{name}.self_attention")
        b = self.attention(a, other, other_mask, f"{name}.cross_attention")
        return self.feed_forward(b, f"{name}.feed_forward")

    def bridge(self, form: str, y: Tensor, x: Tensor, mask: Tensor, name: str) -> Tensor:
        """Return the joined states of one row of Table 1.

        Args:
            y: state of the tower layer.
            x: state of the cross-modal layer before.
            name: prefix of the bridge's parameters, with the trailing dot.
        """
        if form in ("cross_attention", "cross_attention_ffn"):
            key_mask = mask if self.masks_padding else torch.ones_like(mask)
            attended = self.attention(x, y, key_mask, f"{name}attention")
            return attended if form == "cross_attention" else self.feed_forward(attended, f"{name}feed_forward")
        both = torch.cat([y, x], dim=-1)
        if form == "add":
            joined = y + x
        elif form == "product":
            joined = y * x
        elif form == "interpolate":
            beta = self.weights[f"{name}beta"]
            joined = y - beta * y + beta * x
        elif form == "gated_interpolate":
            gate = 1 / (1 + torch.exp(-self.linear(both, f"{name}gate")))
            joined = y - gate * y + gate * x
        elif form == "linear_concat":
            joined = self.linear(both, f"{name}linear")
        elif form == "mlp_concat":
            inner = self.norm(self.linear(both, f"{name}expand"), f"{name}inner_norm", BRIDGE_EPS)
            joined = self.linear(gelu(inner), f"{name}contract")
        else:
            assert form == "linear_residual"
            joined = x + y + self.linear(torch.cat([x, y], dim=-1), f"{name}linear")
        return self.norm(joined, f"{name}norm", BRIDGE_EPS)

    def fuse(
        self, form: str, texts: Sequence[Tensor], images: Sequence[Tensor], mask: Tensor, bridged: int, layers: int
    ) -> tuple[Tensor, Tensor]:
        """Return the last text and image states of one pair.

        Args:
            texts: transformed states of the tower layers that are read, lowest first.
            images: transformed states of the vision tower, likewise.
            bridged: number of bridged layers; 0: only the last tower states are read.
            layers: number of cross-modal layers.
        """
        everywhere = torch.ones(len(images[0]), dtype=torch.bool)
        x, y = texts[0], images[0]
        if bridged:
            x = self.norm(x, "cross_modal.text_norm", BRIDGE_EPS)
            y = self.norm(y, "cross_modal.image_norm", BRIDGE_EPS)
        for index in range(layers):
            if 1 <= index < bridged:
                x = self.bridge(form, texts[index], x, mask, f"cross_modal.text_bridges.{index - 1}.")
                y = self.bridge(form, images[index], y, everywhere, f"cross_modal.image_bridges.{index - 1}.")
            x, y = (
                self.layer(x, mask, y, everywhere, f"cross_modal.text_layers.{index}"),
                self.layer(y, everywhere, x, mask, f"cross_modal.image_layers.{index}"),
            )
        return x, y

    def pool(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat(
            [torch.tanh(self.linear(x[:1], "text_pooler")), torch.tanh(self.linear(y[:1], "image_pooler"))]
        )


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU, not its tanh approximation."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance
