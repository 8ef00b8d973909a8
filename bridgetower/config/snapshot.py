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
from typing import Any, TypeVar

from bridgetower.config.finetune import FinetuneConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.overrides import from_dict, to_dict
from bridgetower.config.run import RunConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.io.files import write_atomically

RUN_FILE = "run.json"

Settings = RunConfig | FinetuneConfig
"""Of a run of either kind."""
AnyConfig = TypeVar("AnyConfig", bound=Settings)
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
_FIXED_SECTIONS = ("model", "objectives", "optim", "seed", "task", "init")
_FIXED_DATA_FIELDS = (
    "global_batch_size",
    "negative_group_size",
    "shards_per_window",
    "itm_negatives",
    "corpus_weights",
    "exact_resize",
    "augmentation",
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
    folder: Path,
    config: Settings,
    identity: Identity,
    *,
    world_size: int,
    device: str,
    started_from: str = "",
    kernels: str = "",
) -> None:
    """Write ``run.json`` for a run that starts or goes on.

    Args:
        device: what it runs on, for people.
        started_from: the checkpoint of another run, or empty.
        kernels: what computes the layers.
    """
    content = {
        "config": to_dict(config),
        **dataclasses.asdict(identity),
        "started_from": started_from,
        "world_size": world_size,
        "device": device,
        "kernels": kernels,
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
    """The configuration of a pretraining run, as ``read_config`` gives it."""
    return read_config(path, RunConfig)


def read_config(path: Path, kind: type[AnyConfig]) -> AnyConfig:
    """The configuration of a ``run.json``, checked as strictly as a command line.

    Raises:
        ConfigError: there is none, it is not one, or it is of a run of the other kind.
    """
    content = read_run_file(path)["config"]
    if _is_finetuned(content) != (kind is FinetuneConfig):
        kinds = [("pretraining", "pretrain"), ("fine-tuning", "finetune")]
        name, folder = kinds[_is_finetuned(content)]
        raise ConfigError(f"{path} is of a {name} run. Use the commands of {folder}/ with it.")
    try:
        return from_dict(kind, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_model_config(path: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Model and heads of a run of either kind.

    Raises:
        ConfigError: as ``read_config``.
    """
    if _is_finetuned(read_run_file(path)["config"]):
        finetuned = read_config(path, FinetuneConfig)
        return finetuned.model, finetuned.heads
    pretrained = read_config(path, RunConfig)
    return pretrained.model, pretrained.objectives.heads


def _is_finetuned(content: Mapping[str, Any]) -> bool:
    return "task" in content


def check_resume(folder: Path, config: Settings, identity: Identity) -> str:
    """Stop at a run folder that must not be continued, or cannot be with these settings.

    Returns: the path that the run started from, or starts from now; empty for one from the beginning.

    Raises:
        ConfigError: the folder has checkpoints, and ``resume`` means others.
        CheckpointError: there is nothing where ``resume`` points to, or it is another run.
    """
    has_own = has_checkpoints(folder)
    path = "" if config.resume in ("auto", "never") else str(Path(config.resume).resolve())
    if has_own:
        started_from = str(read_run_file(folder / RUN_FILE)["started_from"])
        if config.resume == "never":
            raise ConfigError(
                f"{folder} already holds a run with checkpoints, and resume=never. Give another --name, delete the "
                "folder, or use --resume=auto to go on with it."
            )
        # The command that started it may be repeated, as Slurm does; it then goes on from the run's own newest.
        if path and path != started_from:
            raise ConfigError(
                f"{folder} has checkpoints of its own and did not start from resume={config.resume}. Use "
                "--resume=auto to go on from its newest, or another --name for a run that starts from there."
            )
        check_same_run(folder, config, identity)
        return started_from
    if path:
        if not Path(path).is_dir():
            raise CheckpointError(
                f"resume={config.resume} is neither a run folder nor a checkpoint. Use auto, never, or a folder "
                f"such as {Path(config.run_root) / 'NAME'} or .../checkpoints/step0001000."
            )
        run_folder = Path(path).parent.parent if Path(path).parent.name == "checkpoints" else Path(path)
        check_same_run(run_folder, config, identity)
    return path


def has_checkpoints(folder: Path) -> bool:
    """Whether a run folder holds a run that has been saved."""
    return any((folder / "checkpoints").glob("step*"))


def check_same_run(folder: Path, config: Settings, identity: Identity) -> None:
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
