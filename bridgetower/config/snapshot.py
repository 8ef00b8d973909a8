"""``run.json``: everything a run was made of, so that it can be repeated and a resumed one compared with it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.config.overrides import from_dict, to_dict
from bridgetower.config.schema import RunConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.files import write_atomically

RUN_FILE = "run.json"
_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "webdataset",
    "transformers",
    "open_clip_torch",
    "numpy",
    "bridgetower",
)

# What is read again later: by a resumed run, the evaluation or the report.
_SECTIONS: dict[str, type] = {
    "config": dict,
    "data_digests": dict,
    "optimizer": str,
    "precision": str,
    "contrast_pairs": int,
    "started_from": str,
    "world_size": int,
    "device": str,
    "commit": str,
}

# What decides which numbers a run computes. Everything else (workers, micro-batch, logging) may change on resume.
_FIXED_SECTIONS = ("model", "objectives", "optim", "seed")
_FIXED_DATA_FIELDS = (
    "global_batch_size",
    "negative_group_size",
    "shards_per_window",
    "itm_negatives",
    "corpus_weights",
    "exact_resize",
)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What decides a run's numbers beside its settings."""

    data_digests: dict[str, str]
    """Digest of the manifest of each training corpus, by folder."""
    optimizer: str
    """The implementation that ``auto`` became."""
    precision: str
    """What weights are held in for computing: bf16 or fp32."""
    contrast_pairs: int
    """Pairs that ITC compares with each other: those of one micro-step on all ranks. 0 without ITC."""


def write_run_file(
    folder: Path, config: RunConfig, identity: Identity, *, world_size: int, device: str, started_from: str = ""
) -> None:
    """Write ``run.json`` for a run that starts or goes on.

    Args:
        device: what it runs on, for people.
        started_from: the checkpoint of another run, or empty.
    """
    content = {
        "config": to_dict(config),
        **dataclasses.asdict(identity),
        "started_from": started_from,
        "world_size": world_size,
        "device": device,
        "command": sys.argv,
        "commit": find_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    write_atomically(folder / RUN_FILE, json.dumps(content, indent=1).encode() + b"\n")


def read_run_file(path: Path) -> dict[str, Any]:
    """The content of a ``run.json``.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"There is no {path}. A run folder has one from its first step on.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Give a run folder or its {RUN_FILE}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from error
    for name, kind in _SECTIONS.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ConfigError(
                f"{path} is not the {RUN_FILE} of a run: it has no section {name!r}. Take an unedited one."
            )
    checked: dict[str, Any] = content
    return checked


def read_run_config(path: Path) -> RunConfig:
    """The configuration of a ``run.json``, checked as strictly as a command line."""
    try:
        return from_dict(RunConfig, read_run_file(path)["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_same_run(folder: Path, config: RunConfig, identity: Identity) -> None:
    """Stop a resume that would not continue the run it reads.

    Raises:
        CheckpointError: a setting that decides the numbers, or the training data, is another than the run began with.
    """
    before = read_run_file(folder / RUN_FILE)
    old, new = before["config"], to_dict(config)
    changed = [
        f"{name}: {_at(old, name)} -> {_at(new, name)}"
        for name in _fixed_names(new)
        if _at(old, name) != _at(new, name)
    ]
    for name in ("optimizer", "precision"):
        if before[name] != getattr(identity, name):
            changed.append(f"{name}: {before[name]} -> {getattr(identity, name)}")
    if before["contrast_pairs"] != identity.contrast_pairs:
        changed.append(
            f"pairs that ITC compares (data.micro_batch_size x ranks): {before['contrast_pairs']} -> "
            f"{identity.contrast_pairs}"
        )
    if list(before["data_digests"].values()) != list(identity.data_digests.values()):
        changed.append(
            f"training data: {', '.join(before['data_digests'])} -> {', '.join(identity.data_digests)} "
            "(other shards, or another content of the same folders)"
        )
    if changed:
        raise CheckpointError(
            f"{folder} was begun with other settings, so going on would not be the same run:\n  "
            + "\n  ".join(changed)
            + "\nGive the settings it was begun with, or another --name to start a new run."
        )


def _fixed_names(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in content.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict):
            names += _fixed_names(value, f"{full}.")
        elif full.split(".")[0] in _FIXED_SECTIONS or (prefix == "data." and name in _FIXED_DATA_FIELDS):
            # optim.implementation is compared as what it became: auto and fused may be the same.
            names += [full] if full != "optim.implementation" else []
    return names


def _at(content: Mapping[str, Any], name: str) -> Any:
    value: Any = content
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def find_commit() -> str:
    """The commit of this code, with + where files differ from it; empty outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if dirty else "")
