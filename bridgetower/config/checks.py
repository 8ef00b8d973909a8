"""Range checks that several sections of the settings use."""

from __future__ import annotations

from bridgetower.errors import ConfigError


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless a value is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}={value} is not in [0, 1). It is a fraction: 10 % is written 0.1.")


def check_positive(**values: int | float) -> None:
    """Raise ConfigError unless every value is above 0. In a name, ``__`` stands for a dot: ``data__workers``."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name.replace('__', '.')}={value} must be greater than 0. Give a positive number.")
