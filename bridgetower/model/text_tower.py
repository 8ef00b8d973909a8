"""The text tower: a RoBERTa-like encoder that returns the states of its last layers.

Shapes: R captions, L tokens of the longest caption, T tokens of all captions, D width, E width inside a feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, BertConfig, PretrainedConfig, RobertaConfig, XLMRobertaConfig

from bridgetower.config.model import CUSTOM, TextTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.layout import Layout, padded
from bridgetower.kernels.ops import Ops
from bridgetower.model.known_towers import TEXT_TOWERS, is_bert, known_text_name
from bridgetower.model.named_sizes import fill_sizes

_MODEL_TYPES = ("roberta", "xlm-roberta", "camembert", "bert")
_ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}


class TextTower(nn.Module):
    """A transformers encoder without its pooler, which BridgeTower never uses.

    The weights are held by transformers' modules, but the forward pass is ours: theirs would compute padding.
    """

    def __init__(self, config: TextTowerConfig, ops: Ops | None = None) -> None:
        """Build it with random weights.

        Args:
            config: complete (``complete_text_config``).
            ops: what computes the layers; None: ``choose_ops()``.
        """
        super().__init__()
        self.encoder = build_encoder(encoder_config(config))
        self.encoder.embeddings.dropout = nn.Identity()  # all dropout is drawn by the operations
        self.dropout, self.ops = config.dropout, ops or choose_ops()

    def forward(
        self, ids_RL: Tensor, attention_mask_RL: Tensor, num_states: int, *, recompute: bool = False
    ) -> list[Tensor]:
        """Run all layers once on padded captions.

        Args:
            ids_RL: token ids; padding has the encoder's pad id, from which a RoBERTa counts positions.
            attention_mask_RL: True for real tokens.
            num_states: how many of the last layers to return.
            recompute: keep only the input of each layer, and compute the layer again in the backward pass.

        Returns: the states of the last layers, lowest first, each of shape (R, L, D).
        """
        position_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)
        position_RL = position_L.expand(ids_RL.shape)
        if self._first_position:  # RoBERTa gives padding the position of its pad id
            is_real_RL = ids_RL != self.encoder.config.pad_token_id
            position_RL = is_real_RL.cumsum(dim=1) * is_real_RL + self.encoder.config.pad_token_id
        states = self._run(ids_RL.flatten(), position_RL.flatten(), padded(attention_mask_RL), num_states, recompute)
        return [states_TD.unflatten(0, ids_RL.shape) for states_TD in states]

    def packed(
        self, ids_T: Tensor, column_T: Tensor, layout: Layout, num_states: int, *, recompute: bool = False
    ) -> list[Tensor]:
        """Run all layers once on packed captions.

        Args:
            ids_T: tokens of all captions.
            column_T: position of each token in its caption, from 0.
            layout: where the captions lie.
            num_states: how many of the last layers to return.
            recompute: keep only the input of each layer, and compute the layer again in the backward pass.

        Returns: the states of the last layers, lowest first, each of shape (T, D).
        """
        position_T = column_T + self._first_position
        if layout.spans is None and self._first_position:  # on a padded grid: padding has a position of its own
            pad_id = self.encoder.config.pad_token_id
            position_T = position_T.masked_fill(ids_T == pad_id, pad_id)
        return self._run(ids_T, position_T, layout, num_states, recompute)

    @property
    def _first_position(self) -> int:
        """Row of the position table that a caption's first token reads."""
        config = self.encoder.config
        return 0 if config.model_type == "bert" else int(config.pad_token_id) + 1

    def _run(self, ids_T: Tensor, position_T: Tensor, layout: Layout, num_states: int, recompute: bool) -> list[Tensor]:
        states_TD = self.encoder.embeddings(input_ids=ids_T[None], position_ids=position_T[None])[0]
        states_TD = self.ops.drop(states_TD, self.dropout if self.training else 0.0)
        outputs = [states_TD]
        for layer in self.encoder.encoder.layer:
            if recompute and torch.is_grad_enabled():
                states_TD = checkpoint(self._layer, layer, states_TD, layout, use_reentrant=False)
            else:
                states_TD = self._layer(layer, states_TD, layout)
            outputs.append(states_TD)
        return outputs[-num_states:]

    def _layer(self, layer: Any, states_TD: Tensor, layout: Layout) -> Tensor:
        """Run one of transformers' layers on packed states."""
        ops, attention = self.ops, layer.attention.self
        states_TD, query, key, value = ops.project(states_TD, attention.query, attention.key, attention.value)
        dropout = attention.dropout.p if layer.training else 0.0
        heads = attention.num_attention_heads
        attended_TD = ops.attend(query, key, value, heads, dropout, query_layout=layout, key_layout=layout)
        states_TD = self._add_norm(layer.attention.output, states_TD, attended_TD)
        if self.encoder.config.hidden_act == "gelu":
            states_TD, inner_TE = ops.activate(states_TD, layer.intermediate.dense)
        else:
            inner_TE = layer.intermediate(states_TD)
        return self._add_norm(layer.output, states_TD, inner_TE)

    def _add_norm(self, output: Any, states_TD: Tensor, inner: Tensor) -> Tensor:
        """Run one of transformers' output modules: LN(x + Dropout(W h + b))."""
        dropout = output.dropout.p if output.training else 0.0
        return self.ops.project_add_norm(states_TD, inner, output.dense, output.LayerNorm, dropout)[1]


def build_encoder(config: PretrainedConfig) -> Any:
    """Return a transformers encoder with random weights and no pooler."""
    # These modules take seconds to import; sizes and costs do not need them.
    from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

    classes = dict(zip(_MODEL_TYPES, (RobertaModel, XLMRobertaModel, CamembertModel, BertModel), strict=True))
    config._attn_implementation = "sdpa"
    return classes[config.model_type](config, add_pooling_layer=False)


def encoder_config(config: TextTowerConfig) -> PretrainedConfig:
    """Return transformers' configuration of a text tower.

    Args:
        config: complete (``complete_text_config``).
    """
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    if config.name == CUSTOM:
        sizes = {field: getattr(config, field) for field in next(iter(TEXT_TOWERS.values()))}
        return RobertaConfig(**_ROBERTA, **_their_names(sizes), **dropout)
    named = _named(config.name)
    content = {
        **named.to_dict(),
        **dropout,
        "num_hidden_layers": config.num_layers or named.num_hidden_layers,
    }
    return type(named).from_dict(content)


def complete_text_config(config: TextTowerConfig) -> TextTowerConfig:
    """Return the settings of a text tower with the sizes of its named encoder.

    Raises:
        ConfigError: the encoder cannot be config or is not RoBERTa-like, a configured size differs from its own, or its
            position table is too short for ``max_tokens``.
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
            "Use that many or fewer."
        )
    return complete


def longest_text(config: TextTowerConfig) -> int:
    """Return the most tokens of a text: a RoBERTa's positions start after its pad id, so its table holds fewer."""
    theirs = encoder_config(config)
    return config.num_positions - (0 if theirs.model_type == "bert" else theirs.pad_token_id + 1)


def _their_names(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of an encoder under transformers' names."""
    return {
        "vocab_size": sizes["vocabulary_size"],
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": 4 * sizes["width"],
        "max_position_embeddings": sizes["num_positions"],
    }


@lru_cache
def _named(name: str) -> PretrainedConfig:
    known = known_text_name(name)  # the most used encoders need no download
    if known is not None:
        sizes = _their_names(TEXT_TOWERS[known])
        if is_bert(name):
            return BertConfig(**sizes)
        return (XLMRobertaConfig if known.startswith("xlm-") else RobertaConfig)(**_ROBERTA, **sizes)
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"model.text.name={name} could not be found: {(str(error).strip().splitlines() or [''])[0]} Give a folder "
            "on disk with its config.json, a model of the Hugging Face hub (run once where there is network access), "
            f"{CUSTOM}, or one that needs no network: {', '.join(TEXT_TOWERS)}."
        ) from error
    if config.model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"model.text.name={name} is a {config.model_type}, which cannot be bridged here: its layers or positions "
            f"work differently from RoBERTa's. What fits: {', '.join(_MODEL_TYPES)}, e.g. roberta-base."
        )
    # transformers 5.23 ignores this setting and would build a tower that computes something else.
    if (positions := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise ConfigError(
            f"model.text.name={name} has {positions} positions (position_embedding_type in its config.json), which "
            "transformers no longer supports. Use an encoder with absolute positions, e.g. bert-base-uncased."
        )
    if getattr(config, "is_decoder", False):
        raise ConfigError(f"model.text.name={name} is a decoder, which does not see later words. Use an encoder.")
    return config
