"""A W&B workspace for the runs of a project: ``python pretrain/dashboard.py --entity=TEAM --project=bridgetower``."""

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

Builds a workspace for the runs that train.py sends to W&B, and prints its address. ENTITY is a team or a user; PROJECT
is what --tracker.wandb_project says (default: bridgetower). The same command again brings the panels of that workspace
up to date and leaves its filters and colours as they are. --dry-run prints the JSON that would be sent; it needs
neither a key nor a network."""

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
            f"There is no W&B key for {_server()}. Run `wandb login` or set WANDB_API_KEY; --dry-run needs none."
        )
    workspace = _build(entity, project, name)
    if is_dry:
        print(json.dumps(request(workspace), indent=1))
    else:
        print(_send(workspace))


def request(workspace: Any) -> dict[str, Any]:
    """The variables of the GraphQL mutation that creates a workspace, with its specification as an object."""
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
    for flag, value in (("entity", entity), ("project", project), ("name", name)):
        if not value.strip():
            raise ConfigError(f"--{flag} is missing. {USAGE.splitlines()[0]} (--help says more)")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", entity):
        raise ConfigError(
            f"--entity={entity} is no name of a team or user: letters, digits, - and _. It is the first part of "
            "ENTITY/PROJECT in a project's address."
        )
    if re.search(r"[/\\#?%:]", project) or len(project) > 128:
        raise ConfigError(
            f"--project={project} is no name of a project: 128 characters at most, and none of / \\ # ? % :. It is the "
            "second part of ENTITY/PROJECT in a project's address."
        )


def _build(entity: str, project: str, name: str) -> Any:
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
        raise ConfigError(f"--name={name} holds emoji or a sign like + or $, which W&B does not take.") from error
    # Workspace.save keeps a name that is there; a function of the names makes the next call find it.
    digest = hashlib.sha256("/".join((entity, project, name)).encode()).hexdigest()
    built._internal_name = f"nw-{digest[:11]}-v"
    return built


def _send(workspace: Any) -> str:
    """Create the workspace, or give one that is there its panels; the address.

    Raises:
        ConfigError: W&B does not answer, or refuses.
    """
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.errors import SpecVersionError

    wandb.setup(wandb.Settings(silent=True))
    place = f"{workspace.entity}/{workspace.project}"
    key = workspace._internal_name.removeprefix("nw-").removesuffix("-v")
    try:
        try:
            found = Workspace.from_url(f"https://wandb.ai/{place}?nw={key}")
        except ValueError as error:  # with three meanings
            if str(error).startswith("Project"):
                raise ConfigError(
                    f"{_server()} has no project {place} that this key may see. W&B makes it with the first run: train "
                    f"with --tracker.wandb_entity={workspace.entity} --tracker.wandb_project={workspace.project}."
                ) from error
            if not str(error).startswith("Workspace"):
                raise _unknown_format(error) from error
        else:
            found.sections = workspace.sections
            workspace = found
        workspace.save()
    except (Error, WandbApiFailedError) as error:
        raise _refusal(error, place) from error
    except SpecVersionError as error:
        raise _unknown_format(error) from error
    return str(workspace.url)


def _unknown_format(error: Exception) -> ConfigError:
    return ConfigError(
        "The workspace is there, in a format that the installed wandb-workspaces does not know "
        f"({_line(error)}). Choose another --name, or delete the workspace in W&B."
    )


def _refusal(error: Exception, place: str) -> ConfigError:
    """What a person can do about an answer of W&B, or about none."""
    cause = error if hasattr(error, "response") else error.__cause__
    said = _line(cause or error)
    if cause is not None and getattr(cause, "response", None) is None:
        return ConfigError(
            f"{_server()} does not answer ({said}). Run this where the network is, e.g. on the login node; "
            "WANDB_BASE_URL says which server, WANDB_HTTP_TIMEOUT how many seconds it has."
        )
    return ConfigError(
        f"{_server()} refuses: {said}. The key must be one of the server's, of an account that may write to {place}: "
        "`wandb login --relogin` changes it."
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "W&B"


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
