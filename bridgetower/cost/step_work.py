"""The operations of a training step per pair, which speed is reported against."""

from __future__ import annotations

from typing import NamedTuple

from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.micro_batch import count_operations
from bridgetower.cost.sizes import has_formula
from bridgetower.model.sizes import complete_model_config


class StepWork(NamedTuple):
    """Operations per pair as a linear function of the caption's length, which fits because captions are short."""

    without_text: float
    per_token: float

    def of_pair(self, text_tokens: float) -> float:
        """Return the operations of one pair, forward and backward.

        Args:
            text_tokens: mean length of the captions with their <s> and </s>.
        """
        return self.without_text + self.per_token * text_tokens


def step_work(config: ModelConfig, objectives: ObjectivesConfig) -> StepWork:
    """Fit the operations of steps with short and with longer captions, 15 % of their words masked.

    Recomputed layers are not counted as work. A vision tower without a formula is run once on torch's meta device,
    which takes seconds and must happen before there is a process group.
    """
    config = complete_model_config(config)
    counted = None
    if not has_formula(config.vision):
        from bridgetower.cost.counted import count_vision_tower

        counted = count_vision_tower(config)

    def of_pair(num_tokens: int, num_masked: int) -> float:
        captions = CaptionLengths((num_tokens,) * 2, (num_masked,) * 2)
        return count_operations(config, objectives, captions, counted) / 2

    short, longer = of_pair(7, 1), of_pair(27, 4)
    per_token = (longer - short) / 20
    return StepWork(short - 7 * per_token, per_token)
