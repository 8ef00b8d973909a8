"""Reads the fields of a JSON row by type; a field of another type is refused with its file, row and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridgetower.errors import DataError

_MAX_SHOWN = 80
_SUGGESTION = "Correct the row, or copy or download the file as its owner publishes it."


def get_text(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that is a text, which may be empty.

    Args:
        where: names the row in errors.

    Raises:
        DataError: the field is missing, or not a text.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise field_error(row, name, where, "a text")
    return value


def get_file_name(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that is the name of a file or folder, not a path that could lead out of its folder.

    Raises:
        DataError: the field is missing, or not such a name.
    """
    value = row.get(name)
    if not isinstance(value, str) or value in ("", ".", "..") or any(character in value for character in "/\\\0"):
        raise field_error(row, name, where, "the name of a file or folder, without a path")
    return value


def get_whole_number(row: Mapping[str, Any], name: str, where: str) -> int:
    """Return a field that is a whole number.

    Raises:
        DataError: the field is missing, or not a whole number.
    """
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise field_error(row, name, where, "a whole number")
    return value


def get_optional_whole_number(row: Mapping[str, Any], name: str, where: str) -> int | None:
    """Return a field that is a whole number; None where it is null or missing.

    Raises:
        DataError: the field is something else.
    """
    return None if row.get(name) is None else get_whole_number(row, name, where)


def get_objects(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Return a field that is a list of JSON objects, which may be empty.

    Raises:
        DataError: the field is missing, or not such a list.
    """
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(element, dict) for element in value):
        raise field_error(row, name, where, "a list of JSON objects")
    return value


def require_object(value: Any, where: str) -> dict[str, Any]:
    """Return the value itself if it is a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_shorten(value)}; it has to be a JSON object. {_SUGGESTION}")
    return value


def field_error(row: Mapping[str, Any], name: str, where: str, expected: str) -> DataError:
    """Make the error for a field with a wrong value.

    Args:
        expected: what the field has to be, in a few words.
    """
    actual = f"{name}={_shorten(row[name])}" if name in row else f"no {name}"
    return DataError(f"{where} has {actual}; it has to be {expected}. {_SUGGESTION}")


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
