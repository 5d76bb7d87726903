"""Options of a command, taken from an earlier picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .options import PromptOptions

if TYPE_CHECKING:
    import typer

    from ..generate import GenerationSettings, LoadedPipeline

Options = TypeVar("Options", bound=PromptOptions)


def record_like(picture: Path) -> dict[str, Any]:
    """The record of a picture.

    Args:
        picture: A PNG file that `sag` drew from a prompt.

    Raises:
        ValueError: The file does not exist, or is no such picture.
    """
    from ..generate import read_record

    if not picture.is_file():
        raise ValueError(f"like={str(picture)!r} does not exist")
    record = read_record(picture)
    if "prompt" not in record or "guidance_scale" not in record["settings"]:
        raise ValueError(f"like={str(picture)!r} is no single picture of a prompt")
    return record


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


def settings_like(
    loaded: LoadedPipeline,
    given: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    given_names: Collection[str],
) -> GenerationSettings:
    """Settings of pictures: those given, else a picture's, else what the model recommends.

    Args:
        loaded: The model.
        given: Arguments of `GenerationSettings`; `None` and empty texts count as not given.
        record: The record of the picture, if there is one.
        given_names: Names of options that were given even so.
    """
    if record is None:
        return loaded.settings(**given)
    from ..generate import digests

    chosen = {
        name: value
        for name, value in given.items()
        if name in given_names or value not in (None, "")
    }
    settings = loaded.settings(**{**record["settings"], **chosen})
    for name, digest in record.get("start", {}).items():
        if name not in chosen and digests(settings)[name] != digest:
            raise ValueError(f"{name}={getattr(settings, name)!r} is another picture than it was")
    return settings
