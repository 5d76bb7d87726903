"""Options of a command, taken from an earlier picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..generate.record_check import check_record
from .options import PromptOptions

if TYPE_CHECKING:
    import typer

Options = TypeVar("Options", bound=PromptOptions)


def record_like(picture: Path) -> dict[str, Any]:
    """The record of a picture, checked to be complete.

    Args:
        picture: A PNG file that `sag` drew from a prompt.

    Raises:
        ValueError: The file does not exist, or is no such picture; the message has the entry of the
            record that is wrong.
    """
    from ..generate import read_record

    if not picture.is_file():
        raise ValueError(f"like={str(picture)!r} does not exist")
    try:
        record = read_record(picture)
        settings = record.get("settings")
        if "prompt" in record and isinstance(settings, dict) and "guidance_scale" in settings:
            check_record(record)
            return record
    except ValueError as error:
        reason = str(error).removeprefix(f"path={str(picture)!r}").removeprefix(":").strip()
        raise ValueError(f"like={str(picture)!r}: {reason}") from error
    raise ValueError(f"like={str(picture)!r} is no single picture of a prompt")


def given_names(context: typer.Context) -> frozenset[str]:
    """Names of the options that were given, here or in a file; even with the default value.

    Args:
        context: The context of the command.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(n for n, source in sources.items() if source and source.name != "DEFAULT")


def as_drawn(options: Options, record: Mapping[str, Any], given_names: Collection[str]) -> Options:
    """Replace default options by a picture's model, dtype, LoRAs and seed.

    Args:
        options: The options of the command.
        record: The record of the picture.
        given_names: Names of the options that were given; they are kept.

    Raises:
        ValueError: The picture's model cannot be found by its name alone.
    """
    from ..models.builtin import builtin_names

    found: dict[str, Any] = {}
    if "model" not in given_names and record["model"] != options.model:
        if record["model"] not in builtin_names():
            raise ValueError(
                f"model: the picture was drawn by {record['model']!r}: say where it is"
            )
        found["model"] = record["model"]
    if "dtype" not in given_names:
        found["dtype"] = record["dtype"]
    if options.lora is None and "loras" in record:
        found["lora"] = [f"{path}:{scale!r}" for path, scale in record["loras"]]
    if "seed" not in given_names:
        found["seed"] = record["seed"]
    return replace(options, **found)


def arguments_like(
    given: Mapping[str, Any], record: Mapping[str, Any] | None, given_names: Collection[str]
) -> dict[str, Any]:
    """Arguments of `GenerationSettings`: those given, else a picture's.

    Args:
        given: Arguments of `GenerationSettings`; `None` and empty texts count as not given.
        record: The record of the picture, if there is one.
        given_names: Names of options that were given even so.

    Raises:
        ValueError: The picture began with another one that has changed since.
    """
    if record is None:
        return dict(given)
    from ..generate import GenerationSettings, digests

    chosen = {
        name: value
        for name, value in given.items()
        if name in given_names or value not in (None, "")
    }
    arguments = {**record["settings"], **chosen}
    now = digests(GenerationSettings(**{n: v for n, v in arguments.items() if v is not None}))
    for name, digest in record.get("start", {}).items():
        if name not in chosen and now.get(name, digest) != digest:
            raise ValueError(f"{name}={arguments[name]!r} is another picture than it was")
    return arguments
