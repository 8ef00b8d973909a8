"""``bridgetower.load_model`` on an export of each format, in a process of its own: what a user sees of it."""

from __future__ import annotations

import subprocess
import sys

from bridgetower.interop.huggingface import save_huggingface, to_huggingface
from bridgetower.interop.reference import to_reference
from bridgetower.interop.safetensors_file import save_safetensors
from bridgetower.model.bridgetower import BridgeTower
from tests.interop.models import filled, port_like_config

LOAD = """
import sys
import bridgetower
for path in sys.argv[1:]:
    assert list(bridgetower.load_model(path).heads) == ["mlm"], path
# Reading a folder of transformers takes its configuration alone, not its model and image classes.
for name in ("modeling_bridgetower", "image_processing_bridgetower"):
    assert f"transformers.models.bridgetower.{name}" not in sys.modules, name
"""


def test_opening_an_export_of_any_format_prints_nothing_and_imports_no_class_of_transformers_port(tmp_path):
    model = filled(BridgeTower(port_like_config(), ("mlm",)))
    save_safetensors(model, tmp_path / "model.safetensors")
    to_reference(model, tmp_path / "model.ckpt")
    save_huggingface(model, tmp_path / "ours")
    to_huggingface(model).save_pretrained(tmp_path / "theirs")
    paths = [str(tmp_path / name) for name in ("model.safetensors", "model.ckpt", "ours", "theirs")]
    opened = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True)
    assert (opened.returncode, opened.stdout, opened.stderr) == (0, "", "")
