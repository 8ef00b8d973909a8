"""The sizes of a whole model, from the names of its towers; no model is built."""

from __future__ import annotations

import dataclasses

from bridgetower.config.model import ModelConfig
from bridgetower.model.named_vits import complete_vision_config
from bridgetower.model.text_tower import complete_text_config


def complete_model_config(config: ModelConfig) -> ModelConfig:
    """Fill in the sizes that the towers' names stand for, and check that all parts fit together.

    Raises:
        ConfigError: a tower cannot be found or bridged, or the parts do not fit.
    """
    return dataclasses.replace(
        config, vision=complete_vision_config(config.vision), text=complete_text_config(config.text)
    )
