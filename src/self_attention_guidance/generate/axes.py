"""The axes of a grid: an axis is a name with values, a cell is a picture's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..checks import (
    check_finite,
    check_layer,
    check_number,
    check_seed,
    check_steps,
    check_text,
    parse_number,
)
from ..guidance.text import parse_guidance
from .settings import GenerationSettings

if TYPE_CHECKING:
    from ..guidance import Guidance, GuidanceSum

AXES = ("prompt", "seed", "guidance", "scale", "cfg", "steps", "blur", "window", "layer")
_OF_GUIDANCE = ("blur", "window", "layer")
_SETTINGS = {"scale": "sag_scale", "cfg": "guidance_scale", "steps": "num_inference_steps"}
_HEADINGS = {
    "cfg": "CFG {}",
    "scale": "scale {}",
    "seed": "seed {}",
    "steps": "{} steps",
    "blur": "blur sigma {}",
    "window": "window {}",
    "layer": "layer {}",
}


@dataclass(frozen=True)
class Axis:
    """A side of a grid.

    Attributes:
        name: One of "prompt", "seed", "guidance", "scale" (of the guidance), "cfg" (the scale
            of classifier-free guidance), "steps", "blur" (`blur_sigma` of the guidance), "window"
            (its `start` and `stop`) or "layer" (its `layer` or `layers`).
        values: At least one text or number. For "guidance", each is a `Guidance`, or `None` for no
            guidance; for "window", a pair; for "layer", a text with plus signs between several
            layers, or `None` for those that the guidance has without this axis.
        labels: Names of the values in the grid; if empty, the values themselves.

    Raises:
        ValueError: The name is unknown, there is no value, or one is outside its range.
    """

    name: str
    values: Sequence[Any]
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the name and the values."""
        if self.name not in AXES:
            raise ValueError(f"axis={self.name!r} must be one of {', '.join(AXES)}")
        if not self.values or len(self.labels) not in (0, len(self.values)):
            raise ValueError(f"axis={self.name!r} must have values, and a label for each or none")
        for value in self.values:
            if self.name == "prompt":
                check_text("prompt", value)
            elif self.name == "steps":
                check_steps(value, "steps")
            elif self.name == "seed":
                check_seed(value)
            elif self.name == "window":
                start, stop = value
                if not 0 <= start < stop <= 1:
                    raise ValueError(f"window={start:g}-{stop:g} must be from 0 to 1, upwards")
            elif self.name == "blur" and value != math.inf:
                check_number("blur", value, 0, math.inf)
            elif self.name == "layer" and value is not None:
                check_layer("layer", value)
            elif self.name in ("scale", "cfg"):
                check_finite(self.name, value)

    @property
    def headings(self) -> list[str]:
        """The labels of the values in the grid."""
        if self.name == "guidance":
            pairs = zip(self._texts(), self.values, strict=True)
            return ["no guidance" if value is None else text for text, value in pairs]
        form = _HEADINGS.get(self.name, "{}")
        return [form.format(text) for text in self._texts()]

    def __str__(self) -> str:
        """The text that the command line takes."""
        # A comma can be part of a prompt.
        return f"{self.name}={('|' if self.name == 'prompt' else ',').join(self._texts())}"

    def _texts(self) -> Sequence[str]:
        return self.labels or [self._written(value) for value in self.values]

    def _written(self, value: Any) -> str:
        if value is None:
            return "none" if self.name == "guidance" else "default"
        if self.name == "guidance":
            return _label(value)
        if self.name == "window":
            return f"{value[0]:g}-{value[1]:g}"
        return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture of a grid, to be drawn.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
        settings: All other settings.
        guidance: Its guidance.
    """

    prompt: str
    seed: int
    settings: GenerationSettings
    guidance: Guidance | GuidanceSum

    def at(self, axis: Axis, value: Any) -> Cell:
        """This cell with another value on an axis.

        Args:
            axis: The axis.
            value: One of its values.

        Raises:
            ValueError: The value is outside its range.
        """
        if axis.name in ("prompt", "seed"):
            return replace(self, **{axis.name: value})
        if axis.name in _OF_GUIDANCE:
            return replace(self, guidance=_changed(self.guidance, axis.name, value))
        if axis.name == "guidance" and value is not None:
            return replace(self, guidance=value)
        setting = _SETTINGS.get(axis.name, "sag_scale")
        changed = replace(self.settings, **{setting: 0.0 if value is None else value})
        return replace(self, settings=changed)


def cells_of(base: Cell, rows: Axis, columns: Axis) -> list[list[Cell]]:
    """The cells of a grid, row by row.

    Args:
        base: The settings that no axis changes.
        rows: The axis down the grid.
        columns: The axis across it.

    Raises:
        ValueError: Both axes change the same setting.
    """
    if rows.name == columns.name:
        raise ValueError(f"rows and columns must differ: both are {rows.name}")

    def cell(row: Any, column: Any) -> Cell:
        changes = [(rows, row), (columns, column)]
        is_off = any(axis.name == "guidance" and value is None for axis, value in changes)
        # A guidance is set before its settings; no guidance last, so that it is off at any scale.
        changes.sort(key=lambda change: (change[0].name == "guidance") == is_off)
        drawn = base
        for axis, value in changes:
            if not (is_off and axis.name in _OF_GUIDANCE):
                drawn = drawn.at(axis, value)
        return drawn

    return [[cell(row, column) for column in columns.values] for row in rows.values]


def parse_axis(option: str, text: str) -> Axis:
    """Read an axis like "guidance=none,sag,pag:scale=2,start=0.2" or "prompt=a cat|a dog, red".

    Args:
        option: The option that it is from, for messages.
        text: A name and values, separated by commas, or by bars for prompts. A window is
            "0.2-0.65".

    Returns:
        The axis; the values of "guidance" are still texts, and `None` for "none".

    Raises:
        ValueError: It has another format, or a value is unknown or outside its range.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or name not in AXES:
        raise ValueError(
            f"{option}={text!r} must be NAME=VALUE,VALUE,... with a name of {', '.join(AXES)}"
        )
    parts = [part.strip() for part in rest.split("|" if name == "prompt" else ",")]
    try:
        if name == "guidance":
            texts = _guidances(rest)
            values = [None if each == "none" else each for each in texts]
            for each in filter(None, values):
                parse_guidance(each)
            return Axis(name, values, texts)
        return Axis(name, [_KINDS.get(name, _number)(part) for part in parts])
    except ValueError as error:
        raise ValueError(f"{option}={text!r}: {error}") from None


def with_guidances(axis: Axis, make: Callable[[Mapping[str, Any]], Guidance | GuidanceSum]) -> Axis:
    """An axis of `parse_axis` with guidances instead of their texts.

    Args:
        axis: Any axis; only one of "guidance" is changed.
        make: Makes a guidance from the settings in its text.

    Raises:
        ValueError: A setting is outside its range, or the method does not have it.
    """
    if axis.name != "guidance":
        return axis
    texts = axis.values
    return replace(axis, values=[None if t is None else make(parse_guidance(t)) for t in texts])


def _window(text: str) -> tuple[float, float]:
    start, _, stop = text.partition("-")
    try:
        return parse_number(start, float), parse_number(stop, float)
    except ValueError:
        raise ValueError(f"{text!r} must be START-STOP, for example 0.2-0.65") from None


def _number(text: str, kind: type[int] | type[float] = float) -> float:
    try:
        return parse_number(text, kind)
    except ValueError:
        rule = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r} must be {rule}") from None


_KINDS: Mapping[str, Callable[[str], Any]] = {
    "prompt": str,
    "seed": lambda text: _number(text, int),
    "steps": lambda text: _number(text, int),
    "window": _window,
    "layer": lambda text: None if text == "default" else text,
}


def _guidances(text: str) -> list[str]:
    """Split a text into guidances; a setting after a comma belongs to the guidance before it."""
    found: list[str] = []
    for part in text.split(","):
        is_setting = "=" in part and ":" not in part.partition("=")[0]
        if is_setting and found:
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return found


def _changed(guidance: Guidance | GuidanceSum, name: str, value: Any) -> Guidance | GuidanceSum:
    """A guidance with another blur, window or layer; of a sum, all parts with such a setting."""
    new: dict[str, Any]
    if name == "window":
        new = dict(zip(("start", "stop"), value, strict=True))
    elif name == "blur":
        new = {"blur_sigma": value}
    else:
        new = {"layer": value, "layers": (value or "").split("+")}
    known = [{each.name for each in fields(part)} & new.keys() for part in guidance.parts]
    if not any(known):
        text = "default" if value is None else value
        raise ValueError(f"{name}={text} has no effect on {guidance.method}, which has no {name}")
    if value is None:
        return guidance
    parts = tuple(
        replace(part, **{each: new[each] for each in own})
        for part, own in zip(guidance.parts, known, strict=True)
    )
    return parts[0] if len(parts) == 1 else replace(guidance, guidances=parts)


def _label(guidance: Guidance | GuidanceSum) -> str:
    from .metadata import method_label  # it imports numpy

    return f"{method_label(guidance.method)} {guidance.scale:g}"
