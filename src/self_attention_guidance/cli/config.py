"""Options from a file, `--config FILE`."""

# Not `from __future__ import annotations`: typer reads the types of the callback.

import sys
from pathlib import Path
from typing import Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command; its command line wins.

    Args:
        context: Context of the command.
        path: A TOML file of options by name, such as `sag-scale = 0.5`; `None` changes nothing.

    Returns:
        The path.

    Raises:
        ValueError: The file can't be read, or has an option that the command does not have.
    """
    if path is None:
        return None
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"config={str(path)!r} cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config={str(path)!r} is no TOML: {error}") from error
    known = {
        option.removeprefix("--"): parameter.name
        for parameter in context.command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and parameter.name != "config"
    }
    defaults: dict[str, Any] = {}
    for option, value in given.items():
        name = known.get(option.replace("_", "-"))
        if name is None:
            options = ", ".join(sorted(known))
            raise ValueError(f"config={str(path)!r}: {option!r} is no option; there are {options}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path
