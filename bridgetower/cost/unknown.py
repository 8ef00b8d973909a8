"""The error for what has no formula: a cost is never guessed."""

from __future__ import annotations

from collections.abc import Iterable

from bridgetower.errors import ConfigError


def no_formula(thing: str, name: str, file: str, known: Iterable[str]) -> ConfigError:
    """Return the error for something whose cost is unknown.

    Args:
        thing: what has no formula, e.g. bridge form.
        name: its name in the settings.
        file: where formulas of its type stand, relative to the repository.
        known: names that have one.
    """
    return ConfigError(
        f"There is no cost formula for the {thing} {name!r}, and a guess would be wrong in silence. Add its formula to "
        f"{file}, or use one that has a formula: {', '.join(known)}."
    )
