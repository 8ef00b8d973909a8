"""Command lines of the entry scripts: strict settings and flags, and help and errors of one form."""

from __future__ import annotations

import ast
import dataclasses
import gc
import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bridgetower.config.overrides import BOOLEANS, apply_overrides, type_name, unknown_name, walk_fields
from bridgetower.config.snapshot import Settings, read_config
from bridgetower.errors import EXIT_DONE, BridgeTowerError, ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Settings)


def config_from_cli(
    presets: Mapping[str, Callable[[], AnyConfig]],
    preset: str,
    unexpected: Sequence[str],
    overrides: Mapping[str, str],
    usage: str,
) -> AnyConfig:
    """Build the configuration that a command line describes.

    Args:
        preset: name of a preset, or path of a ``run.json``, whose run is then repeated.
        unexpected: positional words after the preset.
        overrides: texts of settings by dotted name; ``help`` prints every setting and exits.
        usage: how the command is called, its first line alone.

    Raises:
        ConfigError: the preset or a setting is unknown, a value is wrong, or there are unexpected words.
    """
    wants_help = _wants_help(overrides) or preset == "help"
    if wants_help and preset not in presets and not preset.endswith(".json"):
        _print_and_exit(f"{usage}\n\nPresets:\n{_list_presets(presets)}\n\n`PRESET --help` lists every setting.")
    if not preset:
        raise ConfigError(f"Which preset? {usage}\n\nPresets:\n{_list_presets(presets)}")
    if preset.endswith(".json"):
        base = read_config(Path(preset), type(next(iter(presets.values()))()))
    elif preset in presets:
        base = presets[preset]()
    else:
        raise ConfigError(unknown_name("preset", preset, presets))
    if wants_help:
        _print_and_exit(describe_settings(base, usage))
    if unexpected:
        raise ConfigError(
            f"Unexpected word(s) {' '.join(map(str, unexpected))!r} after the preset. Settings are written "
            "--section.field=value."
        )
    return apply_overrides(base, overrides)


def narrow_overrides(
    config: AnyConfig, sections: Sequence[str], unexpected: Sequence[str], overrides: Mapping[str, str], usage: str
) -> AnyConfig:
    """Change settings of a saved run, for commands that use only some of them.

    Args:
        sections: prefixes of the names of the settings that may be changed.
        unexpected: positional words after the run.
        overrides: texts of settings by dotted name; ``help`` prints those that may be changed and exits.
        usage: how the command is called.

    Raises:
        ConfigError: a setting is unknown or may not be changed, a value is wrong, or there are unexpected words.
    """
    if _wants_help(overrides):
        _print_and_exit(describe_settings(config, usage, sections))
    if unexpected:
        raise ConfigError(f"Unexpected word(s) {' '.join(map(str, unexpected))!r}. {usage.splitlines()[0]}")
    known = [name for name, *_ in walk_fields(config) if name.startswith(tuple(sections))]
    for name in overrides:
        if name not in known:
            raise ConfigError(unknown_name("setting", f"--{name}", known))
    return apply_overrides(config, overrides)


def describe_settings(config: Settings, usage: str, sections: Sequence[str] = ("",)) -> str:
    """Return the help text: each setting whose name begins with one of ``sections``, with value, type and meaning."""
    docs: dict[type, dict[str, str]] = {}
    lines = [usage, "", f"Settings and their values in {config.name}:"]
    section = None
    for name, annotation, value, owner in walk_fields(config):
        if not name.startswith(tuple(sections)):
            continue
        if owner not in docs:
            docs[owner] = _field_docs(owner)
        if owner is not section:
            section = owner
            lines += ["", f"{name.rpartition('.')[0] or 'run'}: {(owner.__doc__ or '').strip().splitlines()[0]}"]
        shown = value
        if isinstance(value, tuple):
            shown = ",".join(map(str, value))
        elif isinstance(value, bool):
            shown = str(value).lower()
        lines.append(f"  --{name}={shown}  ({type_name(annotation)})")
        lines += textwrap.wrap(
            docs[owner].get(name.rpartition(".")[2], ""),
            100,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_on_hyphens=False,  # a name such as roberta-base stays whole
        )
    return "\n".join(lines)


def refuse_unknown(unexpected: Sequence[str], overrides: Mapping[str, Any], known: Sequence[str], usage: str) -> None:
    """Stop at words and flags that a command does not know; print its usage and exit for ``help``.

    For commands whose flags are the parameters of a function, not settings.

    Args:
        known: names of all flags.

    Raises:
        ConfigError: there is an unexpected word or an unknown flag (the nearest valid one is suggested).
    """
    if _wants_help(overrides):
        _print_and_exit(usage)
    if unexpected:
        raise ConfigError(
            f"Unexpected word(s) {' '.join(map(str, unexpected))!r}. {usage.splitlines()[0]} (--help says more)"
        )
    for name in overrides:
        raise ConfigError(unknown_name("flag", f"--{name}", known))


def show_usage_or_stop(missing: str, overrides: Mapping[str, Any], usage: str) -> None:
    """Handle a command that was called without its argument: print the usage and exit for ``help``, else stop.

    Args:
        missing: name of the argument, for the error.

    Raises:
        ConfigError: ``help`` is not among the overrides.
    """
    if _wants_help(overrides):
        _print_and_exit(usage)
    raise ConfigError(f"Which {missing}? {usage.splitlines()[0]} (--help says more)")


def parse_whole(name: str, text: str, minimum: int) -> int:
    """Parse the text of a flag as a whole number.

    Raises:
        ConfigError: the text is not a whole number, or is below ``minimum``.
    """
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"--{name}={text} is not a whole number, e.g. --{name}={max(minimum, 1)}.") from None
    if number < minimum:
        raise ConfigError(f"--{name}={number} must be {minimum} or more.")
    return number


def parse_bool(name: str, text: str) -> bool:
    """Parse the text of a flag as true or false.

    Raises:
        ConfigError: the text is neither.
    """
    if text.lower() not in BOOLEANS:
        raise ConfigError(f"--{name}={text} is neither true nor false. Write one of them.")
    return BOOLEANS[text.lower()]


def start_logging(rank: int) -> None:
    """Log to stderr: progress from rank 0, warnings from every rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(message)s" if rank == 0 else f"[rank {rank}] %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger("bridgetower")
    root.handlers = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries without garbage collection.

    Imports create a million objects that all stay, so every collection during them is wasted time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_command(command: Callable[[], Any]) -> None:
    """Run an entry script. Print a BridgeTowerError without a traceback and exit with its code.

    An error that every rank meets before they work apart is printed by the first rank only.
    """
    is_first_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        _refuse_lone_dashes(sys.argv[1:])
        command()
    except BridgeTowerError as error:
        if is_first_rank or error.rank is not None:
            speaker = f"[rank {error.rank}] " if error.rank else ""
            print(f"{speaker}error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _refuse_lone_dashes(words: Sequence[str]) -> None:
    """Raise ConfigError for - and --: fire would run the command without the words after them."""
    for word in words:
        if word in ("-", "--"):
            raise ConfigError(f"A lone {word} would hide the words after it. Leave it out.")


def _wants_help(overrides: Mapping[str, Any]) -> bool:
    return "help" in overrides or "h" in overrides


def _print_and_exit(text: str) -> None:
    print(text)
    sys.exit(EXIT_DONE)


def _list_presets(presets: Mapping[str, Callable[[], Settings]]) -> str:
    width = max(map(len, presets))
    return "\n".join(
        f"  {name:{width}} {(inspect.getdoc(build) or '').splitlines()[0]}" for name, build in presets.items()
    )


def _field_docs(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, read from its source."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= _field_docs(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs
