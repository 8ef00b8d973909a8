"""Preparing data needs no torch: each worker would spend seconds and 300 MB on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO

MODULES = ["data_prep.build_shards", "data_prep.build_tokenizer", "data_prep.shard_writer", "bridgetower.data.manifest"]
MODULES += [f"data_prep.sources.{path.stem}" for path in sorted((REPO / "data_prep" / "sources").glob("[a-z]*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_importing_it_does_not_import_torch(module):
    code = f"import sys, {module}; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_listing_all_sources_does_not_import_torch():
    code = (
        "import sys; from data_prep.build_shards import _sources\n"
        "assert {'emoji', 'folder'} <= set(_sources()) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
