"""Models of transformers, read and written: same outputs and gradients, same bits, no tensor skipped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AddedToken,
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerImageProcessor,
    BridgeTowerModel,
    BridgeTowerProcessor,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from bridgetower.config.model import FusionConfig
from bridgetower.config.named_models import base
from bridgetower.data.text import Tokenizer
from bridgetower.errors import CheckpointError
from bridgetower.interop import names
from bridgetower.interop.huggingface import from_huggingface, save_huggingface, to_huggingface
from bridgetower.interop.huggingface_config import write_config
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.pretrained import resize_positions
from tests.conftest import REPO
from tests.interop.models import assert_same, filled, port_like_config
from tests.interop.port import (
    build_port,
    differences,
    fill,
    gradient_fault,
    numbers_of_ours,
    numbers_of_port,
    port_config,
    ragged_batch,
)

ROBERTA = REPO / "bridgetower/data/assets/roberta"

SHAPES = {
    "one head": {"width": 64, "layers": 2, "bridged": 2},
    "two heads": {"width": 128, "layers": 4, "bridged": 3, "image": 40},
    "all layers bridged": {"width": 192, "layers": 3, "bridged": 3, "patch": 14, "image": 42},
    "one layer bridged": {"width": 128, "layers": 3, "bridged": 1},
    "towers of two widths": {"width": 128, "vision_width": 192, "layers": 3, "bridged": 2},
    "text heads of 32": {"width": 128, "heads": 4, "layers": 3, "bridged": 2},
}


def convert(port):
    """Convert both of the port's classes to one model with both heads."""
    model = from_huggingface(port.masked_lm)
    model.add_head("itm")
    model.itm_head.classifier.load_state_dict(port.retrieval.itm_score.fc.state_dict())
    return model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_states_logits_and_gradients_equal_those_of_transformers(shape):
    config = port_config(**shape)
    port = build_port(config)
    model = convert(port)
    batch = ragged_batch(config, lengths=(11, 3, 7))
    expected, outputs = numbers_of_port(port, batch), numbers_of_ours(model, batch)
    assert all(value <= 1e-5 for value in differences(outputs, expected).values())
    assert 0.1 < expected.text.std() < 10 and 0.1 < expected.word_logits.std() < 10
    expected.loss.backward()
    outputs.loss.backward()
    theirs = {name: value.grad for name, value in port.parameters().items() if value.grad is not None}
    largest_norm = max(float(gradient.norm()) for gradient in theirs.values())
    ours = dict(model.named_parameters())
    assert {names.from_huggingface(name) for name in theirs} == set(ours)
    for name, gradient in theirs.items():
        our_gradient = ours[names.from_huggingface(name) or ""].grad
        assert our_gradient is not None
        fault, limit = gradient_fault(name, our_gradient, gradient, largest_norm)
        assert fault <= limit, name


@torch.no_grad()
def test_with_the_published_epsilon_the_outputs_are_those_of_transformers_with_that_epsilon():
    config = port_config()
    port = build_port(config)
    model = from_huggingface(port.masked_lm, layer_norm_eps=1e-12)
    # The norms of the cross-modal layers and of the MLM head; not those of towers, bridges and before the first layer.
    changed = [
        module
        for name, module in port.masked_lm.named_modules()
        if isinstance(module, nn.LayerNorm) and re.search("cross_modal_(text|image)_layers", name)
    ] + [port.masked_lm.mlm_score.transform.LayerNorm]
    assert len(changed) == 3 * 2 * 3 + 1
    batch = ragged_batch(config, lengths=(11, 3, 7))
    model.add_head("itm")
    model.itm_head.classifier.load_state_dict(port.retrieval.itm_score.fc.state_dict())
    ported = numbers_of_port(port, batch)
    for norm in changed:
        norm.eps = 1e-12
    published, outputs = numbers_of_port(port, batch), numbers_of_ours(model, batch)
    assert all(value <= 1e-5 for value in differences(outputs, published).values())
    # The comparison can fail: with the port's own epsilon the outputs differ by more.
    assert differences(published, ported)["word_logits"] > 2e-5


@torch.no_grad()
def test_the_classes_of_transformers_give_the_same_logits_when_called_as_documented():
    port = build_port(port_config())
    model = convert(port)
    batch = ragged_batch(port.masked_lm.config, lengths=(9, 4))
    inputs = {"pixel_values": batch.pixels, "input_ids": batch.ids, "attention_mask": batch.mask.long()}
    output = model(batch.pixels, batch.ids, batch.mask)
    assert (port.masked_lm(**inputs).logits - model.mlm_logits(output))[batch.mask].abs().max() <= 1e-5
    assert (port.retrieval(**inputs).logits - model.itm_logits(output)).abs().max() <= 1e-5


@pytest.mark.parametrize("heads", [("mlm",), ("itm",), ()])
def test_a_model_comes_back_unchanged_from_a_class_of_transformers(heads):
    model = filled(BridgeTower(port_like_config(), heads))
    theirs = to_huggingface(model)
    assert (
        type(theirs)
        is {
            ("mlm",): BridgeTowerForMaskedLM,
            ("itm",): BridgeTowerForImageAndTextRetrieval,
            (): BridgeTowerModel,
        }[heads]
    )
    assert not theirs.training
    assert_same(from_huggingface(theirs), model)
    batch = ragged_batch(theirs.config, lengths=(9, 4))
    with torch.no_grad():
        their_output = theirs(pixel_values=batch.pixels, input_ids=batch.ids, attention_mask=batch.mask.long())
        output = model(batch.pixels, batch.ids, batch.mask)
        if heads == ("mlm",):
            difference = (their_output.logits - model.mlm_logits(output))[batch.mask]
        else:
            difference = (
                their_output.logits - model.itm_logits(output) if heads else their_output.pooler_output - output.pooled
            )
    assert difference.abs().max() <= 1e-5
    # The weights are copied: training one model leaves the other unchanged.
    theirs.get_input_embeddings().weight.data.zero_()
    assert model.text_tower.encoder.get_input_embeddings().weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_bit_is_lost_in_any_floating_point_dtype(dtype, tmp_path):
    model = filled(BridgeTower(port_like_config(), ("mlm",))).to(dtype)
    assert_same(from_huggingface(to_huggingface(model)), model)
    save_huggingface(model, tmp_path)
    assert_same(from_huggingface(tmp_path), model)


def test_one_of_several_heads_has_to_be_chosen():
    model = filled(BridgeTower(port_like_config(), ("mlm", "itm")))
    with pytest.raises(CheckpointError, match=r"mlm, itm, but each class of transformers has one\. Choose one"):
        to_huggingface(model)
    assert isinstance(to_huggingface(model, "itm"), BridgeTowerForImageAndTextRetrieval)
    assert isinstance(to_huggingface(model, "none"), BridgeTowerModel)
    with pytest.raises(CheckpointError, match="head='vqa'"):
        to_huggingface(model, "vqa")


@pytest.mark.parametrize("heads", [("mlm", "itm"), ("mlm",), ("itm",), ()])
def test_a_folder_opens_in_transformers_and_here(heads, tmp_path):
    model = filled(BridgeTower(port_like_config(vocabulary_size=50265, num_positions=80), heads))
    save_huggingface(model, tmp_path, tokenizer_folder=ROBERTA)
    assert_same(from_huggingface(tmp_path), model)
    classes = {"mlm": BridgeTowerForMaskedLM, "itm": BridgeTowerForImageAndTextRetrieval}
    others_head = {"mlm": {"itm_score.fc.weight", "itm_score.fc.bias"}, "itm": {"mlm_score.bias"}}
    for head, their_class in [(head, classes[head]) for head in heads] or [("none", BridgeTowerModel)]:
        theirs, report = their_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        # With two heads, each class finds the other's head unexpected; with one, nothing.
        unexpected = set(report["unexpected_keys"])
        assert unexpected == set() if len(heads) < 2 else others_head[head] <= unexpected
        assert all(name.startswith(("mlm_score.", "itm_score.")) for name in unexpected)
        batch = ragged_batch(theirs.config, lengths=(9, 4))
        with torch.no_grad():
            expected = theirs(pixel_values=batch.pixels, input_ids=batch.ids, attention_mask=batch.mask.long())
            output = model(batch.pixels, batch.ids, batch.mask)
            if head == "mlm":
                assert (expected.logits - model.mlm_logits(output))[batch.mask].abs().max() <= 1e-5
            elif head == "itm":
                assert (expected.logits - model.itm_logits(output)).abs().max() <= 1e-5
            else:
                assert (expected.pooler_output - output.pooled).abs().max() <= 1e-5


def test_the_processor_of_a_folder_has_robertas_ids_and_the_models_image_size(tmp_path):
    model = BridgeTower(port_like_config(vocabulary_size=50265, num_positions=80), ("mlm",))
    save_huggingface(model, tmp_path, tokenizer_folder=ROBERTA)
    processor = BridgeTowerProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.size["shortest_edge"] == 24
    assert tuple(processor.image_processor.image_mean) == model.pixel_statistics[0]
    assert tuple(processor.image_processor.image_std) == model.pixel_statistics[1]
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    inputs = processor(images=pixels, text="A dog, and a <mask>.", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    # Ids of roberta-base: <s>, "A", " dog", ",", " and", " a", <mask>, ".", </s>.
    assert inputs["input_ids"].tolist() == [[0, 250, 2335, 6, 8, 10, 50264, 4, 2]]
    assert processor.tokenizer.model_max_length == 78
    with torch.no_grad():
        theirs = BridgeTowerForMaskedLM.from_pretrained(tmp_path)
        assert theirs(**inputs).logits.shape == (1, 9, 50265)


def test_the_image_processor_pads_no_image_of_the_large_models_size(tmp_path):
    # With transformers' default size_divisor of 32, a side of 294 px becomes 288 and is padded with black.
    config = dataclasses.replace(port_like_config(patch_size_px=14), image_size_px=294)
    save_huggingface(BridgeTower(config), tmp_path)
    processor = BridgeTowerImageProcessor.from_pretrained(tmp_path)
    white = torch.full((3, 300, 400), 255, dtype=torch.uint8)
    pixels = processor(white, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 294, 294)
    assert (pixels.amin(dim=(2, 3)) == pixels.amax(dim=(2, 3))).all()


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_a_tokenizer_that_transformers_saved_is_exported_with_the_model(file, tmp_path):
    # transformers writes tokenizer.json alone, without vocab.json and merges.txt. Start and end tokens are added
    # although this one has no post-processor.
    files = {"vocab": str(ROBERTA / "vocab.json"), "merges": str(ROBERTA / "merges.txt")}
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as roberta-base has it
    RobertaTokenizer(**files, mask_token=mask).save_pretrained(tmp_path / "theirs")
    saved_file = tmp_path / "theirs" / "tokenizer.json"
    content = json.loads(saved_file.read_text())
    saved_file.write_text(json.dumps({**content, "post_processor": None}))
    model = BridgeTower(port_like_config(vocabulary_size=50265, num_positions=80), ("mlm",))
    save_huggingface(model, tmp_path / "out", tokenizer_folder=tmp_path / "theirs" / file)
    tokenizer = BridgeTowerProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer("A dog, and a <mask>.")["input_ids"] == [0, 250, 2335, 6, 8, 10, 50264, 4, 2]
    assert tokenizer.model_max_length == 78 and tokenizer.pad_token_id == 1
    ours = Tokenizer(str(tmp_path / "theirs"))
    captions = ["A dog, and a caf\u00e9.", "two  dogs", ""]
    assert [ids.tolist() for ids in ours.encode(captions, 50)] == tokenizer(captions)["input_ids"]


def test_a_tokenizer_file_that_is_damaged_or_lacks_a_special_token_is_refused(tmp_path):
    model = BridgeTower(port_like_config(vocabulary_size=3), ("mlm",))
    file = tmp_path / "tokenizer.json"
    words = {"<s>": 0, "<pad>": 1, "</s>": 2}
    for content, said in (
        ("{", "is not a file of the library tokenizers"),
        (json.dumps({"model": {"type": "WordLevel", "vocab": words, "unk_token": "x"}}), "lacks <unk>, <mask>"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=said):
            save_huggingface(model, tmp_path / "out", tokenizer_folder=tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"50265 ids .* model\.text\.vocabulary_size=50 "):
        save_huggingface(BridgeTower(port_like_config()), tmp_path, tokenizer_folder=ROBERTA)
    with pytest.raises(CheckpointError, match=r"There is no .*tokenizer\.json, and no .*vocab\.json"):
        save_huggingface(BridgeTower(port_like_config()), tmp_path, tokenizer_folder=tmp_path / "none")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder that transformers wrote, and its model."""
    folder = tmp_path_factory.mktemp("theirs")
    port = build_port(port_config())
    port.masked_lm.save_pretrained(folder)
    return folder, from_huggingface(port.masked_lm)


def test_a_folder_that_transformers_wrote_is_read(saved):
    folder, model = saved
    assert_same(from_huggingface(folder), model)
    assert_same(from_huggingface(str(folder)), model)


def test_a_folder_of_the_bare_class_is_read(tmp_path):
    port = build_port(port_config())
    port.masked_lm.bridgetower.save_pretrained(tmp_path)
    assert not any(name.startswith("bridgetower.") for name in load_file(tmp_path / "model.safetensors"))
    assert_same(from_huggingface(tmp_path), from_huggingface(port.masked_lm.bridgetower))


def test_a_folder_of_several_files_is_read(saved, tmp_path):
    _, model = saved
    to_huggingface(model).save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(from_huggingface(tmp_path), model)
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-.* cannot be read"):
        from_huggingface(tmp_path)


def test_an_index_that_names_files_outside_its_folder_is_refused(saved, tmp_path):
    shutil.copy(saved[0] / "config.json", tmp_path)
    index = {"weight_map": {"mlm_score.bias": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        from_huggingface(tmp_path)


def test_an_old_folder_with_pickled_weights_and_position_ids_is_read(saved, tmp_path):
    folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["bridgetower.text_model.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["bridgetower.vision_model.visual.embeddings.position_ids"] = torch.arange(10)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    assert_same(from_huggingface(tmp_path), model)


def test_a_folder_with_both_heads_gives_a_model_with_both(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"itm_score.fc.weight": torch.randn(2, 256), "itm_score.fc.bias": torch.randn(2)}
    write_folder(tmp_path, folder, tensors)
    model = from_huggingface(tmp_path)
    assert list(model.heads) == ["mlm", "itm"]
    assert torch.equal(model.itm_head.classifier.weight, tensors["itm_score.fc.weight"])


def write_folder(folder: Path, original: Path, tensors: dict[str, Tensor], **changes: object) -> None:
    """Write other tensors and changed options into a copy of a folder."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["bridgetower.cross_modal_text_layers.2.crossattention.self.key.bias"]
    tensors["bridgetower.cross_modal_text_layers.3.output.dense.bias"] = torch.zeros(128)
    tensors["mlm_score.bias"] = torch.zeros(51)
    tensors["bridgetower.text_model.pooler.dense.bias"] = torch.zeros(7)  # unused, but of another shape
    write_folder(tmp_path, folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        from_huggingface(tmp_path)
    message = str(caught.value)
    assert "1 missing: bridgetower.cross_modal_text_layers.2.crossattention.self.key.bias (128,)" in message
    assert "1 not expected: bridgetower.cross_modal_text_layers.3.output.dense.bias (128,)" in message
    assert "2 of another shape: " in message
    assert "mlm_score.bias (51,), needed (50,)" in message
    assert "bridgetower.text_model.pooler.dense.bias (7,), needed (128,)" in message


def test_weights_that_are_integers_are_refused(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["mlm_score.decoder.weight"] = tensors["mlm_score.decoder.weight"].to(torch.int8)
    write_folder(tmp_path, folder, tensors)
    with pytest.raises(CheckpointError, match=r"1 not of a floating-point .*: mlm_score\.decoder\.weight torch\.int8"):
        from_huggingface(tmp_path)


def test_the_unused_pooler_may_be_missing(saved, tmp_path):
    folder, model = saved
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "text_model.pooler" not in k}
    write_folder(tmp_path, folder, tensors)
    assert_same(from_huggingface(tmp_path), model)


def test_the_position_table_is_resized_as_published(saved):
    folder, model = saved
    larger = from_huggingface(folder, image_size_px=40)
    table = model.vision_tower.vit.positional_embedding
    assert larger.config.image_size_px == 40
    assert torch.equal(larger.vision_tower.vit.positional_embedding, resize_positions(table, 5))
    batch = ragged_batch(port_config(image=40), lengths=(5, 3))
    assert larger(batch.pixels, batch.ids, batch.mask).image_states.shape == (2, 26, 128)


def test_a_tied_decoder_is_tied_in_both_models(tmp_path):
    theirs = BridgeTowerForMaskedLM(port_config(tie_word_embeddings=True)).eval()
    fill(theirs, 0.05)
    model = from_huggingface(theirs)
    assert model.config.heads.mlm_tied and model.mlm_head.decoder is None
    batch = ragged_batch(theirs.config, lengths=(9, 4))
    inputs = {"pixel_values": batch.pixels, "input_ids": batch.ids, "attention_mask": batch.mask.long()}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert (model.mlm_logits(model(batch.pixels, batch.ids, batch.mask)) - expected)[batch.mask].abs().max() <= 1e-5
    back = to_huggingface(model)
    assert back.mlm_score.decoder.weight is back.bridgetower.text_model.embeddings.word_embeddings.weight
    assert_same(from_huggingface(back), model)
    save_huggingface(model, tmp_path)
    opened, report = BridgeTowerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert opened.mlm_score.decoder.weight is opened.bridgetower.text_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, expected)
    assert_same(from_huggingface(tmp_path), model)


def test_a_decoder_that_is_called_tied_and_is_not_is_refused(saved, tmp_path):
    write_folder(tmp_path, saved[0], load_file(saved[0] / "model.safetensors"), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="says tie_word_embeddings=true, but"):
        from_huggingface(tmp_path)


OPTIONS: dict[str, Any] = {
    "share_cross_modal_transformer_layers": False,
    "share_link_tower_layers": True,
    "link_tower_type": "interpolate",
    "init_layernorm_from_vision_encoder": True,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-12,
    "hidden_size": 64,
    "text_hidden_act": "gelu_new",
    "text_layer_norm_eps": 1e-12,
    "text_intermediate_size": 100,
    "text_type_vocab_size": 2,
    "text_pad_token_id": 0,
    "text_is_decoder": True,
    "text_add_cross_attention": True,
    "text_attention_probs_dropout_prob": 0.2,
    "text_num_hidden_layers": 3,
    "vision_layer_norm_eps": 1e-6,
    "vision_num_channels": 1,
    "vision_share_layernorm": False,
    "vision_stop_gradient": True,
    "vision_remove_last_layer": True,
    "vision_hidden_size": 200,
    "vision_patch_size": [8, 8],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_without_a_setting_is_refused_by_name(option, tmp_path):
    config = port_config(**{option: OPTIONS[option]})
    config.save_pretrained(tmp_path)
    save_file({"mlm_score.bias": torch.zeros(50)}, tmp_path / "model.safetensors")
    reported = option.replace("text_", "text_config.").replace("vision_", "vision_config.")
    reported = {
        "layer_norm_eps_from_vision_config.encoder": "layer_norm_eps",
        "init_layernorm_from_vision_config.encoder": "init_layernorm_from_vision_encoder",
        # The fault is reported as unequal depths of the towers.
        "text_config.num_hidden_layers": "vision_config.num_hidden_layers",
        "vision_config.remove_last_layer": "vision_config.num_hidden_layers",
    }.get(reported, reported)
    with pytest.raises(CheckpointError, match=rf"no setting for: .*{reported}="):
        from_huggingface(tmp_path)


def test_a_vision_tower_without_its_last_layer_is_read_if_the_depths_fit():
    theirs = BridgeTowerForMaskedLM(port_config(vision_num_hidden_layers=5, vision_remove_last_layer=True)).eval()
    fill(theirs, 0.05)
    model = from_huggingface(theirs)
    assert model.config.vision.num_layers == 4
    batch = ragged_batch(theirs.config, lengths=(9, 4))
    with torch.no_grad():
        expected = theirs(pixel_values=batch.pixels, input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        assert (model.mlm_logits(model(batch.pixels, batch.ids, batch.mask)) - expected)[batch.mask].abs().max() <= 1e-5


def test_cross_modal_layers_have_as_many_heads_as_the_text_tower_whatever_the_configuration_says():
    theirs = BridgeTowerForMaskedLM(port_config(num_attention_heads=8)).eval()
    fill(theirs, 0.05)
    model = from_huggingface(theirs)
    assert model.config.fusion.num_heads == 2
    batch = ragged_batch(theirs.config, lengths=(9, 4))
    with torch.no_grad():
        expected = theirs(pixel_values=batch.pixels, input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        assert (model.mlm_logits(model(batch.pixels, batch.ids, batch.mask)) - expected)[batch.mask].abs().max() <= 1e-5


def test_a_norm_whose_epsilon_was_changed_by_hand_is_refused():
    theirs = BridgeTowerForMaskedLM(port_config())
    theirs.mlm_score.transform.LayerNorm.eps = 1e-12
    with pytest.raises(CheckpointError, match=r"1 norms .* mlm_score\.transform\.LayerNorm with 1e-12"):
        from_huggingface(theirs)


def test_the_contrastive_class_is_refused_and_loads_without_its_contrastive_heads(tmp_path):
    config = port_config(contrastive_hidden_size=32, logit_scale_init_value=2.6592)
    theirs = BridgeTowerForContrastiveLearning(config).eval()
    with pytest.raises(CheckpointError, match=r"not the published ITC heads.* drop_contrastive_heads=True"):
        from_huggingface(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="itc_cross_modal_head"):
        from_huggingface(tmp_path)
    model = from_huggingface(tmp_path, drop_contrastive_heads=True)
    assert_same(model, from_huggingface(theirs.bridgetower))


def test_another_model_is_refused(tmp_path):
    roberta = RobertaModel(
        RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(CheckpointError, match="RobertaModel is not a BridgeTower model of transformers"):
        from_huggingface(roberta)
    roberta.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json .* model_type is 'roberta'"):
        from_huggingface(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub name"):
        from_huggingface(tmp_path / "nowhere")


def test_a_folder_without_weights_with_an_lfs_pointer_or_with_a_truncated_file_is_refused(saved, tmp_path):
    shutil.copy(saved[0] / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        from_huggingface(tmp_path)
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        from_huggingface(tmp_path)
    pointer.write_bytes((saved[0] / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        from_huggingface(tmp_path)


def test_a_hub_name_that_cannot_be_downloaded_is_refused(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"BridgeTower/bridgetower-base .* no route to the hub"):
        from_huggingface("BridgeTower/bridgetower-base")


def _fusion(**changes) -> FusionConfig:
    return dataclasses.replace(port_like_config().fusion, **changes)


UNFIT = {
    "bridge=product": lambda c: dataclasses.replace(c, fusion=_fusion(bridge="product")),
    "num_external_layers=1": lambda c: dataclasses.replace(c, fusion=_fusion(num_external_layers=1)),
    "num_layers=0": lambda c: dataclasses.replace(c, fusion=_fusion(num_layers=0)),
    "fusion.width=192": lambda c: dataclasses.replace(c, fusion=_fusion(width=192)),
    "fusion.num_heads=4": lambda c: dataclasses.replace(c, fusion=_fusion(num_heads=4)),
    "fusion.dropout=0.3": lambda c: dataclasses.replace(c, fusion=_fusion(dropout=0.3)),
    "vision.num_layers=5": lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, num_layers=5)),
    "vision.num_heads=4": lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, num_heads=4)),
    "has GELU": lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, activation="gelu")),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_model_that_transformers_cannot_hold_is_refused_with_the_reason(reason, tmp_path):
    model = BridgeTower(UNFIT[reason](port_like_config()), ("mlm",))
    for export in (lambda: to_huggingface(model), lambda: save_huggingface(model, tmp_path)):
        with pytest.raises(CheckpointError, match=rf"transformers cannot hold this model: .*{reason}"):
            export()


def test_another_epsilon_is_written_with_a_warning_and_unchanged_weights(tmp_path, caplog):
    config = dataclasses.replace(port_like_config(), fusion=_fusion(layer_norm_eps=1e-12))
    model = filled(BridgeTower(config, ("mlm",)))
    save_huggingface(model, tmp_path)
    assert "an epsilon of 1e-05 in all norms, this model has 1e-12" in caplog.text
    assert from_huggingface(tmp_path).config.fusion.layer_norm_eps == 1e-5
    assert_same(from_huggingface(tmp_path, layer_norm_eps=1e-12), model)


def test_heads_without_a_class_are_left_out_only_on_request(tmp_path):
    model = filled(BridgeTower(port_like_config(), ("mlm", "itc", "vqa")))
    with pytest.raises(CheckpointError, match=r"no class for the head\(s\) itc, vqa .*drop_heads=\['itc', 'vqa'\]"):
        save_huggingface(model, tmp_path)
    save_huggingface(model, tmp_path, drop_heads=("itc", "vqa"))
    assert list(from_huggingface(tmp_path).heads) == ["mlm"]


def test_the_published_base_has_the_ports_defaults():
    config = base()
    model = BridgeTower(dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, layer_norm_eps=1e-5)))
    written, default = write_config(model, "BridgeTowerModel").to_dict(), BridgeTowerConfig().to_dict()
    for section in ("text_config", "vision_config"):
        assert written.pop(section) == default.pop(section)
    different = {name for name in written if written[name] != default.get(name)}
    assert different <= {"architectures", "dtype"}


def test_the_tokenizer_of_a_folder_is_robertas(tmp_path):
    save_huggingface(BridgeTower(port_like_config(vocabulary_size=50265)), tmp_path, tokenizer_folder=ROBERTA)
    tokenizer = RobertaTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (1, 50264, 50265)
    assert tokenizer.decode(tokenizer("two dogs")["input_ids"], skip_special_tokens=True) == "two dogs"
