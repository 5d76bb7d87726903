"""Errors as a user of the command line reads them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..generate.failing import OUT_OF_MEMORY

# Settings whose options have other names.
_OTHER_NAMES = {"num_inference_steps": "steps", "width": "size", "height": "size"}
# The places in a message where the settings that it is about are named.
_SETTING = re.compile(r"(?:^|(?<= below ))([a-z_]+)(?==|: | must not be | was given | of which )")

# Arguments in Python that a message advises to give, and what to type instead.
_ARGUMENTS = {
    "overwrite=True": "--overwrite",
    r"method='(\w+)' has": r"--guidance \1 has",
    r"^(--(?:mask|strength)=.*) needs image$": r"\1 needs --image",
}


def as_typed(message: str, command: Any, arguments: Sequence[str]) -> str:
    """A message of the library, with its names of settings replaced by options.

    Args:
        message: For example "num_inference_steps=0 must be at least 1".
        command: The app as typer's command.
        arguments: Arguments of the command line.

    Returns:
        "--steps=0 must be at least 1".
    """
    options = _options(command, arguments)
    typed = {word.partition("=")[0] for word in arguments}

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        option = options.get(_OTHER_NAMES.get(name, name))
        # A setting that was given in the text of --guidance is not an option.
        if option is None or (option not in typed and "--guidance" in typed):
            return name
        return f"{option}: {name}" if name in ("width", "height") else option

    typed_message = _SETTING.sub(replaced, message)
    for pattern, option in _ARGUMENTS.items():
        typed_message = re.sub(pattern, option, typed_message)
    return typed_message


def wrong_value(error: Any, arguments: Sequence[str]) -> str | None:
    """What to say if an option has a value of another kind, or outside its range.

    Args:
        error: Typer's error about the command line.
        arguments: Arguments of the command line.

    Returns:
        For example "--steps='x' must be a whole number"; `None` if the error is another one.
    """
    context, parameter = error.ctx, getattr(error, "param", None)
    if context is None or parameter is None:
        return None
    words = list(arguments[arguments.index(context.info_name) + 1 :])
    given, *_ = context.command.make_parser(context).parse_args(words)
    value = given.get(parameter.name, (context.default_map or {}).get(parameter.name))
    # The command is a dataclass of its options, or a function.
    hints = get_type_hints(inspect.unwrap(context.command.callback), include_extras=True)
    kind, option = get_args(hints[parameter.name])[:2]
    reason = None if value is None else _reason(str(value), kind, option)
    name = next((each for each in parameter.opts if each.startswith("--")), parameter.name)
    return None if reason is None else f"{name}={reason}"


def _reason(text: str, kind: Any, option: Any) -> str | None:
    """A value of an option, and the rule that it breaks."""
    kind = next((each for each in get_args(kind) if each is not NoneType), kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{text!r:.60} must be one of {', '.join(str(each.value) for each in kind)}"
    if kind not in (int, float):
        return None
    try:
        kind(text)
    except ValueError:
        return f"{text!r:.60} must be {'a whole number' if kind is int else 'a number'}"
    if option.max is None:
        return f"{text:.60} must be at least {option.min}"
    return f"{text:.60} must be from {option.min} to {option.max}"


def machine_failure(error: BaseException, command: Any, arguments: Sequence[str]) -> str | None:
    """What to say if memory runs out or the device fails; `None` for other errors.

    Args:
        error: What was raised.
        command: The app as typer's command.
        arguments: Arguments of the command line.
    """
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        line = " ".join(str(error).split())[:200]
        return f"the device does not respond: {line}" if "CUDA error" in line else None
    options = _options(command, arguments)
    ways = {
        "size": "smaller pictures (--size)",
        "batch_size": "fewer at once (--batch-size)",
        "dtype": "half precision (--dtype bfloat16)",
    }
    known = [way for name, way in ways.items() if name in options]
    return f"out of memory: try {' or '.join(known)}" if known else "out of memory"


def _options(command: Any, arguments: Sequence[str]) -> dict[str, str]:
    """The options of the given command, by the names of its parameters."""
    chosen = command.commands.get(arguments[0]) if arguments else None
    found: dict[str, str] = {}
    for parameter in chosen.params if chosen else ():
        names = [name for name in parameter.opts if name.startswith("--")]
        if names:
            found[parameter.name] = names[0]
    return found
