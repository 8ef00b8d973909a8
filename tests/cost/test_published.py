"""Operations of the published step: against its own figures, an independent sum, and the plain model, counted."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from bridgetower.config.model import BridgeForm
from bridgetower.config.named_models import MODELS
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.counted import count_flops, count_vision_tower
from bridgetower.cost.published import count_forward, count_published_step
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import HEADS
from bridgetower.model.init import shapes_alone
from bridgetower.model.plain import PlainBridgeTower
from bridgetower.model.sizes import complete_model_config
from tests.cost.counting import BOTH, meta_batch

# Reference_spec 2.3, GFLOP per pair with 50 tokens, without transforms: 2 x positions x width^2 x 6 layers.
PUBLISHED = {
    "base": {"vision": 59.5, "text": 8.6, "cross": 45.1, "mlm": 3.9, "width": 768, "positions": 325},
    "large": {"vision": 286.7, "text": 30.4, "cross": 105.0, "mlm": 5.3, "width": 1024, "positions": 442},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_pass_has_the_published_number_of_operations(name):
    published = PUBLISHED[name]
    transform = 2 * published["width"] ** 2 * 6
    flops = count_forward(complete_model_config(MODELS[name]()), ("mlm", "itm"), text_tokens=50)
    assert (flops.encode_image - transform * published["positions"]) / 1e9 == pytest.approx(
        published["vision"], abs=0.05
    )
    assert (flops.encode_text - transform * 50) / 1e9 == pytest.approx(published["text"], abs=0.05)
    assert flops.fuse / 1e9 == pytest.approx(published["cross"], abs=0.05)
    assert flops.heads["mlm"] / 1e9 == pytest.approx(published["mlm"], abs=0.05)


@pytest.mark.parametrize(("name", "published"), [("base", 693.979), ("large", 2556.5)])
def test_published_step_has_the_published_operations(name, published):
    step = sum(count_published_step(complete_model_config(MODELS[name]()), BOTH).values())
    assert step / 1e9 == pytest.approx(published, abs=0.05)


def test_published_components_are_what_docs_performance_md_says():
    pieces = count_published_step(complete_model_config(MODELS["base"]()), BOTH)
    assert {name: flops / 1e9 for name, flops in pieces.items()} == pytest.approx(
        {
            "vision_tower": 356.1,
            "image_transform": 13.8,
            "text_tower": 53.6,
            "bridges": 0.0,
            "text_stream": 59.4,
            "image_stream": 199.2,
            "heads": 11.8,
        },
        abs=0.06,
    )


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def layer(own: int, other: int, width: int) -> int:
    """One cross-modal layer of one stream, forward: two attentions and a feed-forward."""
    projections = 2 * matmul(own, width, width) + 2 * matmul(other, width, width)
    self_attention = 4 * matmul(own, width, width) + 2 * matmul(own, width, own)
    cross_attention = projections + 2 * matmul(own, width, other)
    return self_attention + cross_attention + 2 * matmul(own, width, 4 * width)


def test_published_step_of_base_is_the_sum_of_its_matmuls():
    tokens, width, positions = 50, 768, 325
    transforms = 6 * matmul(positions, width, width)
    patch_embedding = matmul(positions - 1, 3 * 16 * 16, width)
    vision = patch_embedding + 12 * (12 * matmul(positions, width, width) + 2 * matmul(positions, width, positions))
    text = 12 * (12 * matmul(tokens, width, width) + 2 * matmul(tokens, width, tokens))
    text += 6 * matmul(tokens, width, width)
    cross = 6 * (layer(positions, tokens, width) + layer(tokens, positions, width))
    # MLM reads text alone: nothing goes back through its last image layer.
    unread = 2 * layer(positions, tokens, width)
    pooled = 2 * matmul(1, width, width) + matmul(1, 2 * width, 2)
    words = tokens * (matmul(1, width, width) + matmul(1, width, 50265))
    # Both the masked and the clean caption, each with an image of its own, go through everything; a backward pass costs
    # two forward passes, but pixels need no gradient.
    expected = 2 * (3 * (vision + transforms + text + cross) - patch_embedding) - unread + 3 * (words + pooled)
    assert sum(count_published_step(complete_model_config(MODELS["base"]()), BOTH).values()) == expected


@pytest.mark.parametrize(
    "fusion",
    [
        *({"bridge": form} for form in get_args(BridgeForm)),
        {"num_external_layers": 2},
        {"num_external_layers": 3, "multi_layer_fusion": True},
        {"num_layers": 0},
    ],
    ids=str,
)
def test_published_step_is_what_torch_counts_in_the_plain_model(fusion):
    tiny = MODELS["tiny"]()
    config = complete_model_config(dataclasses.replace(tiny, fusion=dataclasses.replace(tiny.fusion, num_layers=3)))
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, **fusion))
    batch = meta_batch(config, CaptionLengths((40, 40), (6, 6)))
    with shapes_alone():
        model = PlainBridgeTower(config, BOTH.heads)
        pixels = torch.empty(2, 3, config.image_size_px, config.image_size_px)
    flops, _ = count_flops(lambda: torch.stack(list(model.losses(pixels, batch).values())).sum().backward())
    # The plain model also pools MLM's states, which nothing reads.
    poolers = 2 * matmul(1, config.fusion.width, config.fusion.width)
    assert flops / 2 - poolers == sum(count_published_step(config, BOTH).values())


@pytest.mark.parametrize("name", ["tiny", "meter_fusion", "base_mlp_concat", "base_0_layers"])
def test_forward_pass_is_what_torch_counts_stop_by_stop(name):
    config = complete_model_config(MODELS[name]())
    with shapes_alone():
        model = PlainBridgeTower(config, ("mlm", "itm"))
        pixels = torch.empty(1, 3, config.image_size_px, config.image_size_px)
        ids, mask = torch.ones(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool)
    flops = count_forward(config, ("mlm", "itm"), 13)
    counted, _ = count_flops(lambda: model(pixels, ids, mask))
    assert flops.encode_image + flops.encode_text + flops.fuse == counted


def test_forward_pass_of_a_tower_of_timm_is_counted():
    tiny = MODELS["tiny"]()
    vision = dataclasses.replace(tiny.vision, name="PE-Core-T-16-384", patch_size_px=0, width=0, num_heads=0)
    config = complete_model_config(dataclasses.replace(tiny, image_size_px=64, vision=vision))
    flops = count_forward(config, (), 13, count_vision_tower(config))
    with shapes_alone():
        model = BridgeTower(config)
        pixels = torch.empty(1, 3, 64, 64)
    assert flops.encode_image == count_flops(lambda: model.encode_image(pixels))[0]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_costs_what_its_linear_layers_do(head):
    config = complete_model_config(MODELS["tiny"]())
    with shapes_alone():
        model = BridgeTower(config, (head,))
    weights = [weight for weight in model.heads.parameters() if weight.dim() == 2]
    rows = 13 if head == "mlm" else 1
    assert count_forward(config, (head,), 13).heads[head] == sum(2 * rows * weight.numel() for weight in weights)


def test_objectives_cost_their_passes():
    config = complete_model_config(MODELS["base"]())
    both, mlm, itm = (
        count_published_step(config, objectives)
        for objectives in (BOTH, ObjectivesConfig(itm=False), ObjectivesConfig(mlm=False))
    )
    for name in ("text_tower", "text_stream", "image_stream", "heads"):
        assert both[name] == mlm[name] + itm[name]
    assert both["vision_tower"] == 2 * mlm["vision_tower"]
