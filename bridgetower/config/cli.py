"""The command lines of the entry scripts: strict, and the same for all of them."""

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
    """The configuration that a command line asks for.

    Args:
        preset: name of a preset, or the path of a ``run.json``, whose run is then repeated.
        unexpected: positional words behind the preset.
        overrides: dotted settings; ``help`` prints every setting and ends the program.
        usage: the line that shows how the command is called.

    Raises:
        ConfigError: anything that is not exactly right.
    """
    wants_help = _asks_for_help(overrides) or preset == "help"
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
            f"Unexpected word(s) {' '.join(map(str, unexpected))!r} behind the preset. Settings are written "
            "--section.field=value."
        )
    return apply_overrides(base, overrides)


def narrow_overrides(
    config: AnyConfig, sections: Sequence[str], unexpected: Sequence[str], overrides: Mapping[str, str], usage: str
) -> AnyConfig:
    """The configuration of a run with some settings changed, for commands that only some settings mean something to.

    Args:
        sections: what the names of those settings begin with.

    Raises:
        ConfigError: any other setting, or anything else that is not exactly right.
    """
    if _asks_for_help(overrides):
        _print_and_exit(describe_settings(config, usage, sections))
    if unexpected:
        raise ConfigError(f"Unexpected word(s) {' '.join(map(str, unexpected))!r}. {usage.splitlines()[0]}")
    known = [name for name, *_ in walk_fields(config) if name.startswith(tuple(sections))]
    for name in overrides:
        if name not in known:
            raise ConfigError(unknown_name("setting", f"--{name}", known))
    return apply_overrides(config, overrides)


def describe_settings(config: Settings, usage: str, sections: Sequence[str] = ("",)) -> str:
    """Every setting with its value, type and meaning, or those whose names begin with one of ``sections``."""
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
        shown = (
            ",".join(value)
            if isinstance(value, tuple)
            else str(value).lower()
            if value in (True, False) and isinstance(value, bool)
            else value
        )
        lines.append(f"  --{name}={shown}  ({type_name(annotation)})")
        lines += textwrap.wrap(
            docs[owner].get(name.rpartition(".")[2], ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def refuse_unknown(unexpected: Sequence[str], overrides: Mapping[str, Any], known: Sequence[str], usage: str) -> None:
    """For commands whose flags are the parameters of a function: stop at anything else.

    Raises:
        ConfigError: with the nearest valid flag.
    """
    if _asks_for_help(overrides):
        _print_and_exit(usage)
    if unexpected:
        raise ConfigError(
            f"Unexpected word(s) {' '.join(map(str, unexpected))!r}. {usage.splitlines()[0]} (--help says more)"
        )
    for name in overrides:
        raise ConfigError(unknown_name("flag", f"--{name}", known))


def show_usage_or_stop(missing: str, overrides: Mapping[str, Any], usage: str) -> None:
    """For a command that was called without its argument.

    Raises:
        ConfigError: unless help was asked for, which is printed and ends the program.
    """
    if _asks_for_help(overrides):
        _print_and_exit(usage)
    raise ConfigError(f"Which {missing}? {usage.splitlines()[0]} (--help says more)")


def parse_whole(name: str, text: str, minimum: int) -> int:
    """Read a flag that is a whole number.

    Raises:
        ConfigError: it is not, or is below ``minimum``.
    """
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"--{name}={text} is not a whole number, e.g. --{name}={max(minimum, 1)}.") from None
    if number < minimum:
        raise ConfigError(f"--{name}={number} must be {minimum} or more.")
    return number


def parse_bool(name: str, text: str) -> bool:
    """Read a flag that is on or off.

    Raises:
        ConfigError: it is neither.
    """
    if text.lower() not in BOOLEANS:
        raise ConfigError(f"--{name}={text} is neither true nor false.")
    return BOOLEANS[text.lower()]


def start_logging(rank: int) -> None:
    """Lines for people on stderr: progress from rank 0, warnings from all."""
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
    """For imports of libraries: they make a million objects, all of which stay, and garbage need not be looked for."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_command(command: Callable[[], Any]) -> None:
    """Run an entry script: errors made for people are printed without a traceback and end with their exit code.

    What all ranks find wrong before they start is said once, by the first.
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
    """Stop at - and --, behind which fire keeps every word to itself and runs the command without it."""
    for word in words:
        if word in ("-", "--"):
            raise ConfigError(f"A lone {word} would hide the words behind it. Leave it out; settings need none.")


def _asks_for_help(overrides: Mapping[str, Any]) -> bool:
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
    """The texts below the fields of a dataclass, read from its source."""
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
