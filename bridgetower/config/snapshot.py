"""``run.json``, the record of a run: enough to repeat the run, and to check that a resume continues the same one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from bridgetower.config.finetune import FinetuneConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.overrides import from_dict, to_dict
from bridgetower.config.run import RunConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.io.files import write_atomically

RUN_FILE = "run.json"

Settings = RunConfig | FinetuneConfig
"""Settings of a whole run, pretraining or fine-tuning."""
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

# Entries that a resume, an evaluation or the report reads again, with their JSON types.
_REQUIRED_ENTRIES: dict[str, type] = {
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

# Settings that decide which numbers a run computes. All others (workers, micro-batch, logging) may change on resume.
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

# Settings that older runs have in their run.json and this version no longer has, with their defaults. Each saved work
# and changed no loss and no gradient, so a run that had one switched off can still be opened and continued.
_REMOVED_SETTINGS: Mapping[str, Any] = {
    "compute.share_images": True,
    "compute.pack_text": True,
    "compute.masked_logits_only": True,
    "compute.prune_last_layer": True,
    "compute.share_first_layer": True,
    "compute.absorb_projections": True,
    "compute.joint_pass": True,
}

logger = logging.getLogger("bridgetower.config.snapshot")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides a run's numbers and is not a setting."""

    data_digests: dict[str, str]
    """Digest of each training corpus's manifest, by folder."""
    optimizer: str
    """Implementation of AdamW in use, where the setting may say ``auto``: fused or torch."""
    precision: str
    """Data type of the weights in forward and backward: bf16 or fp32."""
    contrast_pairs: int
    """Number of pairs that ITC contrasts with each other: one micro-step on all ranks. 0 without ITC."""


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
    """Write the ``run.json`` of a run that starts or resumes.

    Args:
        device: name of the hardware, for people.
        started_from: checkpoint of another run that this one started from, or empty.
        kernels: name of what computes the layers.
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
    """Read a ``run.json`` and check that it has the entries that are used later.

    Raises:
        ConfigError: the file is missing, unreadable, not JSON, or lacks an entry.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"There is no {path}. A run writes it before its first step: check the path of the run folder."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Give a run folder or its {RUN_FILE}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Restore the file from a copy.") from error
    for name, json_type in _REQUIRED_ENTRIES.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), json_type):
            raise ConfigError(
                f"{path} is not the {RUN_FILE} of a run: it has no section {name!r}. Give one that was not edited."
            )
    checked: dict[str, Any] = content
    return checked


def read_run_config(path: Path) -> RunConfig:
    """Read the configuration of a pretraining run: ``read_config`` for ``RunConfig``."""
    return read_config(path, RunConfig)


def read_config(path: Path, config_type: type[AnyConfig]) -> AnyConfig:
    """Read the configuration of a ``run.json``, checked as strictly as a command line.

    Settings that this version no longer has are dropped, with a warning if one was not at its default.

    Raises:
        ConfigError: the file is not a run's, the run is a fine-tuning run where pretraining is expected or vice versa,
            or a setting is unknown or has a wrong value.
    """
    content = read_run_file(path)["config"]
    if _is_finetuned(content) != (config_type is FinetuneConfig):
        stage, folder = ("fine-tuning", "finetune") if _is_finetuned(content) else ("pretraining", "pretrain")
        raise ConfigError(f"{path} belongs to a {stage} run. Use the commands of {folder}/ with it.")
    try:
        return from_dict(config_type, _drop_removed_settings(config_type, content, path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _drop_removed_settings(config_type: type[AnyConfig], content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return ``content`` without the settings of ``_REMOVED_SETTINGS`` that ``config_type`` no longer has."""
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    section_types = get_type_hints(config_type)
    changed = []
    for name, default in _REMOVED_SETTINGS.items():
        section, _, field_name = name.partition(".")
        known = {field.name for field in dataclasses.fields(section_types[section])}
        values = kept.get(section)
        if not isinstance(values, dict) or field_name not in values or field_name in known:
            continue
        value = values.pop(field_name)
        if value != default:
            changed.append(f"{name}={json.dumps(value)}")
    if changed:
        logger.warning(
            "%s has %s. These settings no longer exist and are ignored; losses and gradients are the same either way.",
            path,
            ", ".join(changed),
        )
    return kept


def read_model_config(path: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read the model settings and the names of the heads of a pretraining or fine-tuning run.

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
    """Check that a run may start or resume in a folder with these settings.

    Returns:
        The run folder or checkpoint that the run started from, or starts from now; empty if it starts from step 0.

    Raises:
        ConfigError: the folder has checkpoints, and ``resume`` is never or points to others.
        CheckpointError: ``resume`` points to nothing, or to a run with other settings or data.
    """
    path = "" if config.resume in ("auto", "never") else str(Path(config.resume).resolve())
    if has_checkpoints(folder):
        started_from = str(read_run_file(folder / RUN_FILE)["started_from"])
        if config.resume == "never":
            raise ConfigError(
                f"{folder} already holds a run with checkpoints, and resume=never. Give another --name, delete the "
                "folder, or use --resume=auto to continue it."
            )
        # Slurm repeats the command that started the run, --resume=PATH included. The run then continues from its own
        # newest checkpoint.
        if path and path != started_from:
            raise ConfigError(
                f"{folder} has checkpoints of its own and did not start from resume={config.resume}. Use "
                "--resume=auto to continue from its newest checkpoint, or another --name to start a run from there."
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
    """Return True if a run folder holds a checkpoint."""
    return any((folder / "checkpoints").glob("step*"))


def check_same_run(folder: Path, config: Settings, identity: Identity) -> None:
    """Check that a resume would continue the run of a folder: same numbers, same training data.

    Settings of ``compute`` are not compared: they change no loss and no gradient.

    Raises:
        CheckpointError: a setting that decides the numbers, the optimizer, the precision or the training data differs.
    """
    before = read_run_file(folder / RUN_FILE)
    old, new = before["config"], to_dict(config)
    changed = [
        f"{name}: {_get(old, name)} -> {_get(new, name)}"
        for name in _fixed_names(new)
        if _get(old, name) != _get(new, name)
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
            "(other shards, or the same folders with other content)"
        )
    if changed:
        raise CheckpointError(
            f"{folder} was started with other settings, so resuming would not continue the same run:\n  "
            + "\n  ".join(changed)
            + "\nGive the settings it was started with, or another --name to start a new run."
        )


def _fixed_names(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the settings that may not change on resume."""
    names: list[str] = []
    for name, value in content.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict):
            names += _fixed_names(value, f"{full}.")
        elif full.split(".")[0] in _FIXED_SECTIONS or (prefix == "data." and name in _FIXED_DATA_FIELDS):
            # Identity.optimizer is compared instead: auto and fused may be the same implementation.
            names += [full] if full != "optim.implementation" else []
    return names


def _get(content: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name, or None."""
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
    """Return the git commit of this code, with ``+`` if tracked files differ from it; empty outside a checkout."""
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
