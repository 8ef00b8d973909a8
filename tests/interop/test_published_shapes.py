"""The paper's models at full size: compared with Hugging Face's port, and written and read in the published format."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bridgetower.config.named_models import MODELS, base, large
from bridgetower.interop import names
from bridgetower.interop.huggingface import from_huggingface, save_huggingface
from bridgetower.interop.reference import build_reference_tensors, from_reference, to_reference
from bridgetower.interop.reference_config import read_config, write_settings
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.sizes import complete_model_config
from tests.interop.models import assert_same
from tests.interop.port import (
    Numbers,
    build_port,
    differences,
    gradient_fault,
    numbers_of_ours,
    numbers_of_port,
    port_config,
    ragged_batch,
)

BASE = {"width": 768, "layers": 12, "patch": 16, "image": 288}
LARGE = {"width": 1024, "layers": 24, "patch": 14, "image": 294}
# Tensors and values of a published pretraining checkpoint, with RoBERTa's unread pooler and parts of CLIP's text tower.
COUNTS = {"base": (707, 365_636_444), "large": (1043, 917_152_092)}
PRESETS = {"base": base, "large": large}
both_sizes = pytest.mark.parametrize("name", ["base", pytest.param("large", marks=pytest.mark.slow)])


@both_sizes
@pytest.mark.usefixtures("much_memory")
def test_states_logits_and_gradients_equal_hugging_faces(name):
    """The port runs first and is freed, so that a large model's weights are never in memory three times.

    Measured on a CPU: 5.4 GB (base), 12.3 GB (large). For large, one pair with an image of 5 x 5 patches is enough:
    21 x 21 patches would be 15 times the work for the same weights.
    """
    size = {"base": BASE, "large": {**LARGE, "image": 70}}[name]
    config = port_config(bridged=6, vocabulary=50265, positions=514, **size)
    # A small std, so that rounding errors do not grow over the layers.
    port = build_port(config, std=0.02)
    batch = ragged_batch(config, lengths=(12, 7) if name == "base" else (9,))
    expected = numbers_of_port(port, batch)
    expected.loss.backward()
    expected = Numbers(*(value.detach() for value in expected))
    gradients: dict[str, Tensor] = {}
    for theirs, parameter in port.parameters().items():
        if parameter.grad is not None:
            ours = names.from_huggingface(theirs)
            assert ours is not None
            gradients[ours] = parameter.grad
            parameter.grad = None
    model = from_huggingface(port.masked_lm)
    model.add_head("itm")
    model.itm_head.classifier.load_state_dict(port.retrieval.itm_score.fc.state_dict())
    expected_config = complete_model_config(PRESETS[name]())
    assert (model.config.vision, model.config.text) == (expected_config.vision, expected_config.text)
    del port
    gc.collect()

    outputs = numbers_of_ours(model, batch)
    output_differences = differences(outputs, expected)
    largest_norm = max(float(gradient.norm()) for gradient in gradients.values())
    faults: dict[str, tuple[float, float]] = {}

    def compare(ours: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        faults[ours] = gradient_fault(ours, parameter.grad, gradients.pop(ours), largest_norm)
        parameter.grad = None

    for ours, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor, ours=ours: compare(ours, tensor))
    outputs.loss.backward()
    assert gradients == {}
    assert set(faults) == {ours for ours, _ in model.named_parameters()}
    assert all(value <= 1e-5 for value in output_differences.values()), output_differences
    assert {ours: fault for ours, fault in faults.items() if fault[0] > fault[1]} == {}
    # The outputs are large enough to show differences.
    assert 0.1 < expected.text.std() < 10 and 0.1 < expected.word_logits.std() < 10


@pytest.mark.parametrize("name", ["base", "large"])
def test_a_pretraining_checkpoint_has_the_published_tensors(name):
    with torch.device("meta"):
        tensors = build_reference_tensors(BridgeTower(PRESETS[name](), ("mlm", "itm")))
    positions = tensors.pop("text_transformer.embeddings.position_ids")
    assert positions.shape == (1, 514) and positions.dtype == torch.int64  # the only one that is no parameter
    assert (len(tensors), sum(value.numel() for value in tensors.values())) == COUNTS[name]


# Every named model that the published code has a class for.
PUBLISHED = ["base", "large", "meter", "meter_fusion", "meter_original", *(f"base_{n}_layers" for n in range(13))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_is_read_from_the_shapes_of_a_checkpoint(name):
    with torch.device("meta"):
        model = BridgeTower(MODELS[name](), ("mlm", "itm"))
    config = complete_model_config(read_config(build_reference_tensors(model), write_settings(model), "the weights"))
    if not model.config.fusion.num_bridged and model.config.fusion.num_layers:
        # METER's classifiers are as wide as the pooled pair. No head of this checkpoint shows it.
        config = replace(config, heads=replace(config.heads, classifier_scale=2.0))
    assert config == model.config


def random_model(name: str) -> BridgeTower:
    """Build a model with random weights in bfloat16, which takes half the memory of float32."""
    with torch.device("meta"):
        model = BridgeTower(PRESETS[name](), ("mlm", "itm")).bfloat16()
    model.to_empty(device="cpu").eval()
    # Every tensor repeats the same million numbers from another offset: drawing all would take a minute.
    numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for index, value in enumerate(model.state_dict().values()):
        if value.is_floating_point():
            repeats = -(-value.numel() // len(numbers))
            value.copy_(numbers.roll(index).repeat(repeats)[: value.numel()].view_as(value))
    return model


@both_sizes
@pytest.mark.usefixtures("much_memory")
def test_a_model_comes_back_unchanged_from_a_published_checkpoint(name, tmp_path):
    model = random_model(name)
    to_reference(model, tmp_path / "model.ckpt")
    assert_same(from_reference(tmp_path / "model.ckpt"), model)


@pytest.mark.usefixtures("much_memory")
def test_a_model_comes_back_unchanged_from_a_folder_of_hugging_face(tmp_path):
    model = random_model("base")
    save_huggingface(model, tmp_path)
    assert_same(from_huggingface(tmp_path, layer_norm_eps=1e-12), model)
