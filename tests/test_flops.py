"""Operations of one pair against the figures of the published system, and against formulas."""

from __future__ import annotations

import pytest

from bridgetower.config.models import MODELS
from bridgetower.config.schema import ObjectivesConfig
from bridgetower.flops import count_forward, count_step

# Reference_spec 2.3, GFLOP a pair with 50 tokens; transforms apart: 2 x positions x width^2 x 6 layers.
PUBLISHED = {
    "base": {"vision": 59.5, "text": 8.6, "cross": 45.1, "mlm": 3.9, "width": 768, "positions": 325},
    "large": {
        "vision": 286.7,
        "text": 30.4,
        "cross": 105.0,
        "mlm": 5.3,
        "width": 1024,
        "positions": 442,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_pass_has_the_published_number_of_operations(name):
    published = PUBLISHED[name]
    transform = 2 * published["width"] ** 2 * 6
    found = count_forward(MODELS[name](), ("mlm", "itm"), text_tokens=50)
    assert (found.encode_image - transform * published["positions"]) / 1e9 == pytest.approx(
        published["vision"], abs=0.05
    )
    assert (found.encode_text - transform * 50) / 1e9 == pytest.approx(published["text"], abs=0.05)
    assert found.fuse / 1e9 == pytest.approx(published["cross"], abs=0.05)
    assert found.heads["mlm"] / 1e9 == pytest.approx(published["mlm"], abs=0.05)


def matmul(rows, inner, columns):
    return 2 * rows * inner * columns


def layer(own, other, width):
    """One cross-modal layer of one stream, forward: two attentions and a feed-forward."""
    projections = 2 * matmul(own, width, width) + 2 * matmul(other, width, width)
    self_attention = 4 * matmul(own, width, width) + 2 * matmul(own, width, own)
    cross_attention = projections + 2 * matmul(own, width, other)
    return self_attention + cross_attention + 2 * matmul(own, width, 4 * width)


def test_step_is_what_its_parts_cost_forward_and_backward():
    tokens, masked, width, patches = 13, 1.65, 768, 325
    found = count_step(MODELS["base"](), ObjectivesConfig(), tokens, masked)
    transforms = 6 * matmul(patches, width, width)
    patch_embedding = matmul(patches - 1, 3 * 16 * 16, width)
    vision = patch_embedding + 12 * (12 * matmul(patches, width, width) + 2 * matmul(patches, width, patches))
    text = 12 * (12 * matmul(tokens, width, width) + 2 * matmul(tokens, width, tokens)) + 6 * matmul(
        tokens, width, width
    )
    cross = 6 * (layer(patches, tokens, width) + layer(tokens, patches, width)) + 2 * matmul(1, width, width)
    heads = masked * (matmul(1, width, width) + matmul(1, width, 50265)) + matmul(1, 2 * width, 2)
    # The vision tower once; both the masked and the clean caption through the rest; a backward pass costs two forward
    # passes, but pixels need no gradient.
    expected = 3 * (vision + transforms) - patch_embedding + 3 * 2 * (text + cross) + 3 * heads
    assert found == pytest.approx(expected, rel=1e-6)


def test_shorter_captions_cost_less():
    config = MODELS["base"]()
    assert count_step(config, ObjectivesConfig(), 10, 1.2) < count_step(config, ObjectivesConfig(), 13, 1.2)
