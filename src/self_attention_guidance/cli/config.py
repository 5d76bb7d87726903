"""Values of options that no command line holds: options of a file, and the home folder in paths."""

# Not `from __future__ import annotations`: typer reads the types of the callback.

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command; its command line wins.

    Args:
        context: Context of the command.
        path: A TOML file of options by name, such as `sag-scale = 0.5`; `None` changes nothing.

    Returns:
        The path.

    Raises:
        ValueError: The file can't be read, has an option that the command does not have, or has one
            twice or with a value of another type.
    """
    if path is None:
        return None
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"config={str(path)!r} cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config={str(path)!r} is no TOML: {error}") from error
    known = {
        option.removeprefix("--"): parameter.name
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--") and parameter.name != "config"
    }
    # The command is a dataclass of its options.
    command: Any = context.command
    types = get_type_hints(inspect.unwrap(command.callback))
    defaults: dict[str, Any] = {}
    for option, value in given.items():
        name = known.get(option.replace("_", "-"))
        if name is None:
            options = ", ".join(sorted(known))
            raise ValueError(f"config={str(path)!r}: {option!r} is no option; there are {options}")
        if name in defaults:
            raise ValueError(f"config={str(path)!r}: {option} was given twice")
        try:
            defaults[name] = _checked(option, value, types[name])
        except ValueError as error:
            raise ValueError(f"config={str(path)!r}: {error}") from None
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _checked(option: str, value: Any, kind: Any) -> Any:
    """A value of a file, if it is of an option's type; a single one may stand for a list."""
    kind = next((each for each in get_args(kind) if each is not NoneType), kind)
    if get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [_checked(option, each, *get_args(kind)) for each in values]
    kind = kind if kind in _KINDS else str  # paths and choices
    is_of_kind = isinstance(value, (int, float) if kind is float else kind)
    if not is_of_kind or isinstance(value, bool) != (kind is bool):
        written = json.dumps(value, default=str, ensure_ascii=False)
        raise ValueError(f"{option}={written:.60} must be {_KINDS[kind]}")
    return value


def expand_home(command: Any) -> None:
    """Make options that take files or folders read `~` as the user's home folder.

    A shell expands it only at the beginning of a word: not in `--out=~/a`, nor in a file of
    options.

    Args:
        command: The app as typer's command; its commands are changed.
    """
    for each in command.commands.values():
        for parameter in each.params:
            metavar = getattr(parameter, "metavar", None) or ""
            if any(place in metavar for place in ("FILE", "FOLDER", "PICTURE")):
                parameter.callback = _expanding(parameter.callback)


def _expanding(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """A callback of an option that gets the expanded value."""

    def expanded(context: Any, parameter: Any, value: Any) -> Any:
        value = _expanded(value)
        return value if callback is None else callback(context, parameter, value)

    return expanded


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_expanded(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value
