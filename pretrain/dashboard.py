"""Build a W&B workspace for a project's runs: ``python pretrain/dashboard.py --entity=TEAM --project=bridgetower``."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import parse_bool, refuse_unknown, run_command
from bridgetower.engine.wandb_mirror import has_key
from bridgetower.errors import ConfigError

USAGE = """Usage: python pretrain/dashboard.py --entity=ENTITY --project=PROJECT [--name=NAME] [--dry-run]

Builds a workspace for the runs that train.py sends to W&B, and prints its URL. ENTITY is a team or a user; PROJECT is
the value of --tracker.wandb_project (default: bridgetower). Run the command again to update the panels of the
workspace; its filters and colours stay. --dry-run prints the JSON that would be sent, without a key or a network."""

_NAME = "BridgeTower pretraining"


def main(
    *unexpected: str, entity: str = "", project: str = "", name: str = _NAME, dry_run: str = "false", **unknown: str
) -> None:
    """Build the workspace, and send or print it."""
    refuse_unknown(unexpected, unknown, ("entity", "project", "name", "dry-run"), USAGE)
    is_dry = parse_bool("dry_run", dry_run)
    _check_names(entity, project, name)
    if not is_dry and not has_key():
        raise ConfigError(
            f"There is no W&B key for {_server()}. Run `wandb login` or set WANDB_API_KEY; --dry-run needs no key."
        )
    workspace = _build(entity, project, name)
    if is_dry:
        print(json.dumps(request(workspace), indent=1))
    else:
        print(_send(workspace))


def request(workspace: Any) -> dict[str, Any]:
    """Return the variables of the GraphQL mutation that creates a workspace, its specification as an object."""
    view = workspace._to_model()
    return {
        "entityName": view.entity,
        "projectName": view.project,
        "name": view.name,
        "displayName": view.display_name,
        "type": "project-view",
        "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def _check_names(entity: str, project: str, name: str) -> None:
    """Raise ConfigError for a name that is missing, or that W&B cannot have given."""
    for flag, value in (("entity", entity), ("project", project), ("name", name)):
        if not value.strip():
            raise ConfigError(f"--{flag} is missing. {USAGE.splitlines()[0]} (--help says more)")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", entity):
        raise ConfigError(
            f"--entity={entity} is not the name of a team or user, which has only letters, digits, - and _. It is the "
            "first part of ENTITY/PROJECT in a project's URL."
        )
    if re.search(r"[/\\#?%:]", project) or len(project) > 128:
        raise ConfigError(
            f"--project={project} is not the name of a project, which has at most 128 characters and none of "
            "/ \\ # ? % :. It is the second part of ENTITY/PROJECT in a project's URL."
        )


def _build(entity: str, project: str, name: str) -> Any:
    """Build the workspace, not yet sent.

    Raises:
        ConfigError: wandb-workspaces is not installed, or W&B does not accept the name.
    """
    try:
        from pretrain.dashboard_panels import workspace
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "wandb_workspaces":
            raise
        raise ConfigError(
            "The package wandb-workspaces is not installed. Install it with `pip install -e .[dashboard]`."
        ) from error
    try:
        built = workspace(entity, project, name)
    except ValueError as error:
        raise ConfigError(
            f"--name={name} contains emoji or a sign like + or $, which W&B does not accept. Leave them out."
        ) from error
    # Workspace.save keeps an internal name that is set. Derived from the names, it lets the next call find this one.
    digest = hashlib.sha256("/".join((entity, project, name)).encode()).hexdigest()
    built._internal_name = f"nw-{digest[:11]}-v"
    return built


def _send(workspace: Any) -> str:
    """Create the workspace, or update the panels of an existing one.

    Returns: its URL.

    Raises:
        ConfigError: W&B does not answer, or refuses.
    """
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.errors import SpecVersionError

    wandb.setup(wandb.Settings(silent=True))
    project_path = f"{workspace.entity}/{workspace.project}"
    key = workspace._internal_name.removeprefix("nw-").removesuffix("-v")
    try:
        try:
            existing = Workspace.from_url(f"https://wandb.ai/{project_path}?nw={key}")
        except ValueError as error:  # no such project, no such workspace (then it is created), or an unknown format
            if str(error).startswith("Project"):
                raise ConfigError(
                    f"{_server()} has no project {project_path} that this key may see. W&B creates it with the first "
                    f"run: train with --tracker.wandb_entity={workspace.entity} "
                    f"--tracker.wandb_project={workspace.project}."
                ) from error
            if not str(error).startswith("Workspace"):
                raise _unknown_format(error) from error
        else:
            existing.sections = workspace.sections
            workspace = existing
        workspace.save()
    except (Error, WandbApiFailedError) as error:
        raise _refusal(error, project_path) from error
    except SpecVersionError as error:
        raise _unknown_format(error) from error
    return str(workspace.url)


def _unknown_format(error: Exception) -> ConfigError:
    return ConfigError(
        "The workspace exists in a format that the installed wandb-workspaces does not know "
        f"({_line(error)}). Choose another --name, or delete the workspace in W&B."
    )


def _refusal(error: Exception, project_path: str) -> ConfigError:
    """Return an error that says what to do about a refusal by W&B, or about a server that does not answer."""
    cause = error if hasattr(error, "response") else error.__cause__
    reason = _line(cause or error)
    if cause is not None and getattr(cause, "response", None) is None:
        return ConfigError(
            f"{_server()} does not answer ({reason}). Run this where there is a network, e.g. on the login node. "
            "WANDB_BASE_URL sets the server, WANDB_HTTP_TIMEOUT the seconds to wait for it."
        )
    return ConfigError(
        f"{_server()} refuses: {reason}. The key must belong to an account on this server that may write to "
        f"{project_path}; `wandb login --relogin` changes the key."
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "W&B"


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
