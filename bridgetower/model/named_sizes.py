"""The sizes of a tower that is given by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bridgetower.config.model import CUSTOM
from bridgetower.errors import ConfigError

Config = TypeVar("Config")


def fill_sizes(config: Config, section: str, facts: Mapping[str, int]) -> Config:
    """Fill in what a name stands for.

    Args:
        config: of a tower, with a ``name``; 0 stands for the named tower's own size.
        section: of the settings, for errors.
        facts: the named tower's sizes. Of ``num_layers`` a tower may have fewer.

    Raises:
        ConfigError: a size is given that is not the named tower's.
    """
    settings: Any = config
    given = {field: getattr(settings, field) for field in facts}
    for field, value in given.items():
        if field == "num_layers" and value > facts[field]:
            raise ConfigError(f"{section}.{field}={value}: {settings.name} has {facts[field]}. Use so many or fewer.")
        if field != "num_layers" and value not in (0, facts[field]):
            raise ConfigError(
                f"{section}.{field}={value}, but {settings.name} has {facts[field]}. Leave it out, or use "
                f"--{section}.name={CUSTOM} and give all sizes."
            )
    filled: Config = dataclasses.replace(settings, **{field: given[field] or fact for field, fact in facts.items()})
    return filled
