"""The sizes of a whole model, from the names of its towers; no model is built.

open_clip and transformers are imported only for towers that are not in ``bridgetower/model/known_towers.py``: their
imports cost three times as much CPU time as torch.
"""

from __future__ import annotations

import dataclasses

from bridgetower.config.model import ModelConfig, TextTowerConfig
from bridgetower.model.known_towers import complete_known_model, known_padding_id


def complete_model_config(config: ModelConfig) -> ModelConfig:
    """Fill in the sizes that the towers' names stand for, and check that all parts fit together.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    known = complete_known_model(config)
    if known is not None:
        return known
    from bridgetower.model.named_vits import complete_vision_config
    from bridgetower.model.text_tower import complete_text_config

    return dataclasses.replace(
        config, vision=complete_vision_config(config.vision), text=complete_text_config(config.text)
    )


def padding_id(config: TextTowerConfig) -> int:
    """Return the id that padding must have."""
    known = known_padding_id(config.name)
    if known is not None:
        return known
    from bridgetower.model.text_tower import encoder_config

    return int(encoder_config(config).pad_token_id)
