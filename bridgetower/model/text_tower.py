"""The text tower: a transformers RoBERTa that gives the states of its last layers.

Shapes: B captions, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from bridgetower.config.schema import TextTowerConfig


class TextTower(nn.Module):
    """RoBERTa without its pooler, which BridgeTower never uses."""

    def __init__(self, config: TextTowerConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.roberta = RobertaModel(
            RobertaConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=config.width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=4 * config.width,
                max_position_embeddings=config.num_positions,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                pad_token_id=1,
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )

    def forward(self, ids_BL: Tensor, attention_mask_BL: Tensor, num_states: int) -> list[Tensor]:
        """Run all layers once.

        Args:
            ids_BL: token ids; padding has RoBERTa's pad id 1, from which positions are counted.
            attention_mask_BL: True for real tokens.
            num_states: how many of the last layers to hand out.

        Returns: their states, first bridged layer first, each of shape (B, L, D).
        """
        # A 4-d mask is taken as it is; from a 2-d one transformers would first read on the host whether it is full.
        output = self.roberta(
            input_ids=ids_BL, attention_mask=attention_mask_BL[:, None, None, :], output_hidden_states=True
        )
        return list(output.hidden_states[-num_states:])
