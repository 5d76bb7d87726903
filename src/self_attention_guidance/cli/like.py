"""Options of a command, taken from an earlier picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .options import PromptOptions

if TYPE_CHECKING:
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


def as_drawn(options: Options, record: Mapping[str, Any]) -> Options:
    """Replace default options by a picture's model, dtype, LoRAs and seed.

    Args:
        options: The options that were given.
        record: The record of the picture.

    Raises:
        ValueError: The picture's model cannot be found by its name alone.
    """
    from ..models.builtin import builtin_names

    usual = PromptOptions()
    found: dict[str, Any] = {}
    if options.model == usual.model and record["model"] != usual.model:
        if record["model"] not in builtin_names():
            raise ValueError(
                f"model: the picture was drawn by {record['model']!r}: say where it is"
            )
        found["model"] = record["model"]
    if options.dtype == usual.dtype:
        found["dtype"] = record["dtype"]
    if options.lora is None and "loras" in record:
        found["lora"] = [f"{path}:{scale!r}" for path, scale in record["loras"]]
    if options.seed == usual.seed:
        found["seed"] = record["seed"]
    return replace(options, **found)


def settings_like(
    loaded: LoadedPipeline, given: Mapping[str, Any], record: Mapping[str, Any] | None
) -> GenerationSettings:
    """Settings of pictures: those given, else a picture's, else what the model recommends.

    Args:
        loaded: The model.
        given: Arguments of `GenerationSettings`; `None` and empty texts count as not given.
        record: The record of the picture, if there is one.
    """
    if record is None:
        return loaded.settings(**given)
    from ..generate import digests

    chosen = {name: value for name, value in given.items() if value not in (None, "")}
    settings = loaded.settings(**{**record["settings"], **chosen})
    for name, digest in record.get("start", {}).items():
        if name not in chosen and digests(settings)[name] != digest:
            raise ValueError(f"{name}={getattr(settings, name)!r} is another picture than it was")
    return settings
