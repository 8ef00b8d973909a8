"""Filling in the sizes of a tower that is given by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bridgetower.config.model import CUSTOM
from bridgetower.errors import ConfigError

Config = TypeVar("Config")


def fill_sizes(config: Config, section: str, facts: Mapping[str, int]) -> Config:
    """Return the settings of a tower with the sizes of the named model.

    Args:
        config: settings of a tower with a ``name``; a size of 0 is filled in.
        section: section of the settings, for error messages.
        facts: sizes of the named model by field. ``num_layers`` may be set to fewer layers than it has.

    Raises:
        ConfigError: a size differs from that of the named model.
    """
    settings: Any = config
    configured = {field: getattr(settings, field) for field in facts}
    for field, value in configured.items():
        if field == "num_layers" and value > facts[field]:
            raise ConfigError(f"{section}.{field}={value}: {settings.name} has {facts[field]}. Use that many or fewer.")
        if field != "num_layers" and value not in (0, facts[field]):
            raise ConfigError(
                f"{section}.{field}={value}, but {settings.name} has {facts[field]}. Leave it out, or use "
                f"--{section}.name={CUSTOM} and give all sizes."
            )
    filled: Config = dataclasses.replace(
        settings, **{field: configured[field] or fact for field, fact in facts.items()}
    )
    return filled
