"""benchmarks/layers.py on one pair: both ways to compute a part give the same result."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import layers
from bridgetower.errors import ConfigError


@pytest.mark.parametrize("name", [name for name in layers.PARTS if "dropout" not in name])
def test_both_ways_give_the_same_loss_and_gradients(name):
    kept, other, leaves = layers.PARTS[name](1, torch.float32)
    kept().backward()
    gradient = leaves[0].grad
    leaves[0].grad = None
    other().backward()
    assert float(kept().detach()) == pytest.approx(float(other().detach()), rel=1e-4, abs=1e-2)
    torch.testing.assert_close(leaves[0].grad, gradient, rtol=1e-3, atol=1e-4)


def test_the_file_has_the_seconds_kept_memory_and_traffic_of_each_way(tmp_path, capsys):
    out = tmp_path / "results/layers.json"
    threads = torch.get_num_threads()
    layers.main(parts="states_dropout,text_grid", pairs="1", rounds="2", threads=str(threads), out=str(out))
    content = json.loads(out.read_text())
    assert list(content["parts"]) == ["states_dropout", "text_grid"] and content["machine"]["torch"]
    for part in content["parts"].values():
        assert len(part["ratios"]) == 2 and part["ratio"] > 0
        for way in (part["kept"], part["other"]):
            assert way["kept_mb"] > 0 and way["moved_gb"] > 0 and len(way["seconds"]) == 2
    dropout = content["parts"]["states_dropout"]
    # One byte per value, not a float.
    assert dropout["kept"]["kept_mb"] == pytest.approx(dropout["other"]["kept_mb"] / 4, rel=1e-3)
    assert "states_dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dtype": "fp16"}, "--dtype=fp16 is not known. Use one of bf16, fp32"),
        ({"parts": "quick_gelo"}, "--parts: Unknown part quick_gelo. Did you mean quick_gelu"),
        ({"rounds": "0"}, "--rounds=0 must be 1 or more"),
        ({"pair": "3"}, "Unknown flag --pair. Did you mean --pairs"),
    ],
)
def test_wrong_usage_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        layers.main(**flags)
