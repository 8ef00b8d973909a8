"""Reads the fields of a JSON row by type: what its owner would not publish is refused with its place and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridgetower.errors import DataError

_MAX_SHOWN = 80
_CURE = "Correct the row, or copy or download the file as its owner publishes it."


def get_text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that is a text, which may be empty.

    Args:
        where: names the row in errors.

    Raises:
        DataError: it is missing, or something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise field_error(row, name, where, "a text")
    return value


def get_file_name(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that is the name of a file or folder, and no path that could lead anywhere else.

    Raises:
        DataError: it is missing, or something else.
    """
    value = row.get(name)
    if not isinstance(value, str) or value in ("", ".", "..") or any(sign in value for sign in "/\\\0"):
        raise field_error(row, name, where, "the name of a file or folder, without a path")
    return value


def get_whole_number(row: Mapping[str, Any], name: str, where: str) -> int:
    """A field that is a whole number.

    Raises:
        DataError: it is missing, or something else.
    """
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise field_error(row, name, where, "a whole number")
    return value


def get_optional_whole_number(row: Mapping[str, Any], name: str, where: str) -> int | None:
    """A field that is a whole number, or null, or not there.

    Raises:
        DataError: it is something else.
    """
    return None if row.get(name) is None else get_whole_number(row, name, where)


def get_objects(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """A field that is a list of JSON objects, which may be empty.

    Raises:
        DataError: it is missing, or something else.
    """
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise field_error(row, name, where, "a list of JSON objects")
    return value


def require_object(value: Any, where: str) -> dict[str, Any]:
    """An element of an array that is a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_short(value)}; it has to be a JSON object. {_CURE}")
    return value


def field_error(row: Mapping[str, Any], name: str, where: str, wanted: str) -> DataError:
    """The error for a field that is not what it has to be.

    Args:
        wanted: what it has to be, in a few words.
    """
    found = f"{name}={_short(row[name])}" if name in row else f"no {name}"
    return DataError(f"{where} has {found}; it has to be {wanted}. {_CURE}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
