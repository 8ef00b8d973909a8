"""Overrides such as ``optim.base_lr=2e-5``: settings by dotted name, parsed by the annotation of their field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from bridgetower.errors import ConfigError

Config = TypeVar("Config")


def walk_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, type]]:
    """Yield each setting of a configuration: dotted name, annotation, value, and the section's class."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from walk_fields(value, f"{name}.")
        else:
            yield name, hints[field.name], value, type(config)


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """Return a configuration with some settings changed, given as texts by dotted name.

    All are set at once, so that only the result must be consistent, and not each state in between.

    Raises:
        ConfigError: a name is unknown (the nearest valid one is suggested), a text does not fit the field's type, or
            the resulting settings contradict each other.
    """
    annotations = {name: annotation for name, annotation, _, _ in walk_fields(config)}
    content = to_dict(config)
    for name, text in overrides.items():
        if name not in annotations:
            raise ConfigError(unknown_name("setting", f"--{name}", annotations))
        section = content
        *path, leaf = name.split(".")
        for part in path:
            section = section[part]
        section[leaf] = _parse(name, text, annotations[name])
    return from_dict(type(config), content)


def unknown_name(kind: str, given: str, known: typing.Iterable[str]) -> str:
    """Return the error message for an unknown name, with the nearest valid one.

    Args:
        kind: what the name names: setting, flag, preset.
        given: the unknown name, with dashes if it is a flag.
        known: all valid names.
    """
    names = list(known)
    bare = given.lstrip("-")
    near = difflib.get_close_matches(bare, names, n=1, cutoff=0.6)
    if not near:  # the right field without its section, or in a wrong section
        last = bare.rpartition(".")[2]
        near = [name for name in names if name.rpartition(".")[2] == last][:1]
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in names}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(bare.rpartition(".")[2], leaves, n=1, cutoff=0.7)]
    dashes = "--" if given.startswith("--") else ""
    suggestion = f" Did you mean {dashes}{near[0]}?" if near else ""
    listing = f" Known: {', '.join(names)}." if len(names) <= 12 else " --help lists all of them."
    return f"Unknown {kind} {given}.{suggestion}{'' if near and len(names) > 12 else listing}"


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON types: dicts, lists and scalars."""
    content = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(content))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def from_dict(cls: type[Config], content: Mapping[str, Any], prefix: str = "") -> Config:
    """Build a configuration from plain JSON types, as strictly as from the command line.

    Args:
        prefix: dotted name of the section in errors, with a dot at its end.

    Raises:
        ConfigError: a name is unknown, a setting without a default is missing, a value has the wrong type, or settings
            contradict each other.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in content:
        if name not in fields:
            raise ConfigError(unknown_name("setting", f"{prefix}{name}", [f"{prefix}{known}" for known in fields]))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        full = f"{prefix}{name}"
        if name not in content:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"The setting {full} is missing and has no default. Add it.")
            continue
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(content[name], Mapping):
                raise ConfigError(f"{full}={content[name]!r} must be a section with named settings.")
            values[name] = from_dict(typing.cast(type, hints[name]), content[name], f"{full}.")
        else:
            values[name] = _check(full, content[name], hints[name])
    return cls(**values)


def type_name(annotation: Any) -> str:
    """Return the name of a field's type for help and errors."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        element = type_name(get_args(annotation)[0])
        return f"{element},{element},..."
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true|false"}
    return names[annotation]


def _wrong_type(name: str, value: Any, annotation: Any) -> ConfigError:
    if get_origin(annotation) is Literal:
        near = difflib.get_close_matches(str(value), map(str, get_args(annotation)), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return ConfigError(f"{name}={value} is not one of {', '.join(map(str, get_args(annotation)))}.{hint}")
    return ConfigError(f"{name}={value} is not of type {type_name(annotation)}, e.g. {_EXAMPLES[annotation](name)}.")


_EXAMPLES: dict[Any, typing.Callable[[str], str]] = {
    int: lambda name: f"--{name}=1000",
    float: lambda name: f"--{name}=1e-5",
    bool: lambda name: f"--{name}=true",
    str: lambda name: f"--{name}=text",
    tuple[str, ...]: lambda name: f"--{name}=a,b",
    tuple[float, ...]: lambda name: f"--{name}=1,0.5",
}
BOOLEANS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def _parse(name: str, text: str, annotation: Any) -> Any:
    """Turn the text of a command line into the JSON type of the field's annotation."""
    try:
        if get_origin(annotation) is tuple:
            element = get_args(annotation)[0]
            return [element(item.strip()) for item in text.split(",") if item.strip()]
        if annotation is bool:
            return BOOLEANS[text.lower()]
        if annotation is int:
            return int(text) if text.lstrip("+-").replace("_", "").isdigit() else _whole(float(text))
        if annotation is float:
            return float(text)
    except (ValueError, KeyError, OverflowError) as error:
        raise _wrong_type(name, text, annotation) from error
    return text  # a text or a choice; from_dict checks choices


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(f"{number} is not an integer")
    return int(number)


def _check(name: str, value: Any, annotation: Any) -> Any:
    """Return a JSON value as the field's type, or raise ConfigError."""
    if get_origin(annotation) is Literal:
        if value in get_args(annotation):
            return value
    elif get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        if isinstance(value, (list, tuple)) and not any(isinstance(item, str) != (element is str) for item in value):
            return tuple(_check(name, item, element) for item in value)
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            return float(value)
    elif type(value) is annotation:
        return value
    assert not isinstance(annotation, types.UnionType), "settings have one type each"
    raise _wrong_type(name, value, annotation)
