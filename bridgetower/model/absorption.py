"""When the projections of images to keys and values are absorbed into the queries of texts."""

from __future__ import annotations

from bridgetower.config.model import ModelConfig


def absorbs_projections(config: ModelConfig) -> bool:
    """Return True if absorbed projections are less work for the longest captions.

    This is a rule of the model, not of the batch: gradients must become ready in the same order on all ranks, because
    DeepSpeed sums what lies at the same offset of a bucket.
    """
    return config.text.max_tokens * (config.fusion.num_heads - 1) < config.fusion.width
