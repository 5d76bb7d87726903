"""Axes of a grid as text on the command line, "cfg=1,3,7"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..generate.axes import AXES, Axis
from .guidance_text import check_guidance, parse_guidance
from .options import PromptOptions

if TYPE_CHECKING:
    from ..generate import LoadedPipeline


def parse_axis(option: str, text: str) -> Axis:
    """Reads an axis like "guidance=none,sag,pag:scale=2,start=0.2" or "prompt=a cat|a dog, red".

    Args:
        option: Which gave it, for messages.
        text: A name, and values separated by commas, those of prompts by bars.

    Returns:
        The axis; the values of "guidance" are texts still, `None` for "none".

    Raises:
        ValueError: It has another form, or a value is unknown or outside its range.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or name not in AXES:
        raise ValueError(
            f"{option}={text!r} must be NAME=VALUE,VALUE,... with a name of {', '.join(AXES)}"
        )
    if name == "prompt":
        return Axis(name, [value.strip() for value in rest.split("|")])
    if name == "guidance":
        texts = _guidances(rest)
        for each in texts:
            check_guidance([] if each == "none" else [each], {})
        return Axis(name, [None if each == "none" else each for each in texts], texts)
    kind = int if name in ("steps", "seed") else float
    try:
        return Axis(name, [kind(value) for value in rest.split(",")])
    except ValueError as error:
        raise ValueError(f"{option}={text!r}: {error}") from None


def with_guidance(axis: Axis, loaded: LoadedPipeline, options: PromptOptions) -> Axis:
    """An axis with guidances of a model instead of their texts.

    Args:
        axis: Of `parse_axis`.
        loaded: The model, whose recommendations fill up what a text leaves open.
        options: Of the command, which hold for each guidance.

    Raises:
        ValueError: A setting is outside its range, or not one of a method.
    """
    if axis.name != "guidance":
        return axis
    given = options.guidance_arguments()

    def guidance_of(text: str | None) -> Any:
        if text is None:
            return None
        return loaded.guidance(options.fast, **{**given, **parse_guidance(text)})

    return replace(axis, values=[guidance_of(text) for text in axis.values])


def _guidances(text: str) -> list[str]:
    """Texts of guidances; what follows a comma and is a setting belongs to the one before."""
    found: list[str] = []
    for part in text.split(","):
        is_setting = "=" in part and ":" not in part.partition("=")[0]
        if is_setting and found:
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return found
