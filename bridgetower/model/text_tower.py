"""The text tower: a RoBERTa-like encoder of transformers that gives the states of its last layers.

Shapes: R captions, T tokens of all, D width, H heads.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    CamembertModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from bridgetower.config.model import CUSTOM, TextTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.kernels import ops as fused
from bridgetower.kernels.cpu import attend
from bridgetower.kernels.ops import expand, project, project_add_norm
from bridgetower.kernels.spans import attend_spans, fits
from bridgetower.model.named_sizes import fill_sizes
from bridgetower.model.packed import Layout, padded

_CLASSES: dict[str, Any] = {
    "roberta": RobertaModel,
    "xlm-roberta": XLMRobertaModel,
    "camembert": CamembertModel,
    "bert": BertModel,
}

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
# Those that are used most are built without the hub. The sizes are those of their config.json.
_KNOWN: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "roberta-base": (RobertaConfig, {**_ROBERTA, "vocab_size": 50265}),
    "roberta-large": (RobertaConfig, {**_ROBERTA, **_LARGE, "vocab_size": 50265}),
    "distilroberta-base": (RobertaConfig, {**_ROBERTA, "vocab_size": 50265, "num_hidden_layers": 6}),
    "xlm-roberta-base": (XLMRobertaConfig, {**_ROBERTA, "vocab_size": 250002}),
    "xlm-roberta-large": (XLMRobertaConfig, {**_ROBERTA, **_LARGE, "vocab_size": 250002}),
    "bert-base-uncased": (BertConfig, {"vocab_size": 30522}),
    "bert-base-cased": (BertConfig, {"vocab_size": 28996}),
    "bert-large-uncased": (BertConfig, {**_LARGE, "vocab_size": 30522}),
}
_OWNERS = ("FacebookAI/", "distilbert/", "google-bert/")


class TextTower(nn.Module):
    """A transformers encoder without its pooler, which BridgeTower never uses."""

    uses_kernels = True

    def __init__(self, config: TextTowerConfig) -> None:
        """Build it with random weights.

        Args:
            config: complete (``complete_text_config``).
        """
        super().__init__()
        self.encoder = build_encoder(encoder_config(config))

    def forward(
        self, ids_RL: Tensor, attention_mask_RL: Tensor, num_states: int, *, recompute: bool = False
    ) -> list[Tensor]:
        """Run all layers once on padded captions.

        Args:
            ids_RL: token ids; padding has the encoder's pad id, from which a RoBERTa counts positions.
            attention_mask_RL: True for real tokens.
            num_states: how many of the last layers to hand out.
            recompute: keep only what enters a layer.

        Returns: their states, first bridged layer first, each of shape (R, L, D).
        """
        position_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)
        position_RL = position_L.expand(ids_RL.shape)
        if self._first_position:  # a RoBERTa's padding has a position of its own
            is_real_RL = ids_RL != self.encoder.config.pad_token_id
            position_RL = is_real_RL.cumsum(dim=1) * is_real_RL + self.encoder.config.pad_token_id
        states = self._run(ids_RL.flatten(), position_RL.flatten(), padded(attention_mask_RL), num_states, recompute)
        return [states_TD.unflatten(0, ids_RL.shape) for states_TD in states]

    def packed(
        self, ids_T: Tensor, column_T: Tensor, layout: Layout, num_states: int, *, recompute: bool = False
    ) -> list[Tensor]:
        """The same without padding.

        Args:
            ids_T: tokens of all captions.
            column_T: place of each in its caption.
            layout: where they stand.

        Returns: states of shape (T, D).
        """
        return self._run(ids_T, column_T + self._first_position, layout, num_states, recompute)

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for its activation."""
        return bool(self.encoder.config.hidden_act == "gelu")

    @property
    def _first_position(self) -> int:
        """Row of the position table of a caption's first token."""
        config = self.encoder.config
        return 0 if config.model_type == "bert" else int(config.pad_token_id) + 1

    def _run(self, ids_T: Tensor, position_T: Tensor, layout: Layout, num_states: int, recompute: bool) -> list[Tensor]:
        """The parts are transformers'; the way through them is ours, as theirs computes padding."""
        states_TD = self.encoder.embeddings(input_ids=ids_T[None], position_ids=position_T[None])[0]
        handed_out = [states_TD]
        # Compiled layers are theirs.
        kernels = self.uses_kernels and self.has_kernels and fused.fits(states_TD)
        for layer in self.encoder.encoder.layer:
            fuses = kernels and layer.output._compiled_call_impl is None
            if recompute and torch.is_grad_enabled():
                states_TD = checkpoint(_run_layer, layer, states_TD, layout, fuses, use_reentrant=False)
            else:
                states_TD = _run_layer(layer, states_TD, layout, fuses)
            handed_out.append(states_TD)
        return handed_out[-num_states:]


def _run_layer(layer: Any, states_TD: Tensor, layout: Layout, fuses: bool) -> Tensor:
    attention, grid = layer.attention.self, layout.whole
    heads = (attention.num_attention_heads, -1)
    layers = (attention.query, attention.key, attention.value)
    if fuses:
        weight, bias = torch.cat([part.weight for part in layers]), torch.cat([part.bias for part in layers])
        states_TD, *parts = project(states_TD, weight, bias, 3, kernels=True)
    else:
        parts = [part(states_TD) for part in layers]
    dropout = attention.dropout.p if layer.training else 0.0
    if layout.spans is not None and fits(states_TD, attention.num_attention_heads):
        query_THd, key_THd, value_THd = (part_TD.unflatten(-1, heads) for part_TD in parts)
        spans = layout.spans
        attended_TD = attend_spans(query_THd, key_THd, value_THd, spans, spans, dropout, kernels=fuses).flatten(1)
    else:
        query_RHLd, key_RHLd, value_RHLd = (
            grid.spread(part_TD).unflatten(-1, heads).transpose(1, 2) for part_TD in parts
        )
        attended_RHLd = attend(query_RHLd, key_RHLd, value_RHLd, grid.mask_RL, dropout)
        attended_TD = grid.collect(attended_RHLd.transpose(1, 2).flatten(2))
    if fuses:
        states_TD = _finish(layer.attention.output, states_TD, attended_TD)
        states_TD, inner_TE = expand(states_TD, layer.intermediate.dense, kernels=True)
        return _finish(layer.output, states_TD, inner_TE)
    states_TD = layer.attention.output(attended_TD, states_TD)
    result: Tensor = layer.output(layer.intermediate(states_TD), states_TD)
    return result


def _finish(part: Any, states_TD: Tensor, inner: Tensor) -> Tensor:
    """What a part of transformers' does that ends in a sum and its norm."""
    dropout = part.dropout.p if part.training else 0.0
    return project_add_norm(states_TD, inner, part.dense, part.LayerNorm, dropout, kernels=True)[1]


def build_encoder(config: PretrainedConfig) -> Any:
    """A transformers encoder with random weights and no pooler."""
    config._attn_implementation = "sdpa"
    return _CLASSES[config.model_type](config, add_pooling_layer=False)


def encoder_class(config: TextTowerConfig) -> Any:
    """The class of transformers that a text tower is."""
    return _CLASSES[encoder_config(config).model_type]


def encoder_config(config: TextTowerConfig) -> PretrainedConfig:
    """A text tower as transformers describes it.

    Args:
        config: complete.
    """
    if config.name == CUSTOM:
        return RobertaConfig(
            **_ROBERTA
            | {
                "vocab_size": config.vocabulary_size,
                "hidden_size": config.width,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "intermediate_size": 4 * config.width,
                "max_position_embeddings": config.num_positions,
                "hidden_dropout_prob": config.dropout,
                "attention_probs_dropout_prob": config.dropout,
            }
        )
    named = _named(config.name)
    content = {
        **named.to_dict(),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "num_hidden_layers": config.num_layers or named.num_hidden_layers,
    }
    return type(named).from_dict(content)


def complete_text_config(config: TextTowerConfig) -> TextTowerConfig:
    """Fill in the sizes that a name stands for.

    Raises:
        ConfigError: the encoder cannot be found or is not RoBERTa-like, a size that is given is not its own, or its
            position table is shorter than the captions.
    """
    if config.name == CUSTOM:
        return config
    theirs = _named(config.name)
    facts = {
        "vocabulary_size": theirs.vocab_size,
        "width": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_positions": theirs.max_position_embeddings,
    }
    complete = fill_sizes(config, "model.text", facts)
    if config.max_tokens > longest_text(complete):
        raise ConfigError(
            f"model.text.max_tokens={config.max_tokens}: {config.name} reads at most {longest_text(complete)} tokens. "
            "Use so many or fewer."
        )
    return complete


def longest_text(config: TextTowerConfig) -> int:
    """Tokens that the position table of a text tower has rows for: a RoBERTa starts after its pad id."""
    theirs = encoder_config(config)
    return config.num_positions - (0 if theirs.model_type == "bert" else theirs.pad_token_id + 1)


def padding_id(config: TextTowerConfig) -> int:
    """The id that padding must have."""
    return int(encoder_config(config).pad_token_id)


@lru_cache
def _named(name: str) -> PretrainedConfig:
    bare = next((name.removeprefix(owner) for owner in _OWNERS if name.startswith(owner)), name)
    if bare in _KNOWN and not Path(name).is_dir():
        kind, sizes = _KNOWN[bare]
        return kind(**sizes)
    try:
        found = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.name={name} could not be found: {(str(error).strip().splitlines() or [''])[0]} Give a folder "
            f"on disk with its config.json, a name of the hub (run once where it can be reached), {CUSTOM}, or one "
            f"that needs no hub: {', '.join(_KNOWN)}."
        ) from error
    if found.model_type not in _CLASSES:
        raise ConfigError(
            f"model.text.name={name} is a {found.model_type}, which cannot be bridged here: its layers or positions "
            f"work otherwise than RoBERTa's. What fits: {', '.join(_CLASSES)}, e.g. roberta-base or xlm-roberta-base."
        )
    # transformers 5.23 reads the setting no more, and would build a tower that computes something else.
    if (positions := getattr(found, "position_embedding_type", "absolute")) != "absolute":
        raise ConfigError(
            f"model.text.name={name} has {positions} positions (position_embedding_type in its config.json), which "
            "transformers does not build any more. Use an encoder with absolute ones, e.g. bert-base-uncased."
        )
    if getattr(found, "is_decoder", False):
        raise ConfigError(f"model.text.name={name} is a decoder, which does not see later words. Use an encoder.")
    return found
