"""The axes of a grid: an axis is a name and values, a cell is a set of changed settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checks import check_count, check_finite, check_text
from .settings import GenerationSettings

if TYPE_CHECKING:
    from ..guidance import Guidance, GuidanceSum

AXES = ("prompt", "seed", "guidance", "scale", "cfg", "steps")
_SETTINGS = {"scale": "sag_scale", "cfg": "guidance_scale", "steps": "num_inference_steps"}


@dataclass(frozen=True)
class Axis:
    """A side of a grid.

    Attributes:
        name: Of `AXES`: "prompt", "seed", "guidance", "scale" (of the guidance), "cfg" (the scale
            of classifier-free guidance) or "steps".
        values: At least one: texts, numbers, or for "guidance" a `Guidance`, and `None` for none.
        labels: What the grid calls the values; empty writes them out.

    Raises:
        ValueError: The name is unknown, there is no value, or one is outside its range.
    """

    name: str
    values: Sequence[Any]
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks name and values."""
        if self.name not in AXES:
            raise ValueError(f"axis={self.name!r} must be one of {', '.join(AXES)}")
        if not self.values or len(self.labels) not in (0, len(self.values)):
            raise ValueError(f"axis={self.name!r} must have values, and a label for each or none")
        for value in self.values:
            if self.name == "prompt":
                check_text("prompt", value)
            elif self.name in ("steps", "seed"):
                check_count(self.name, value, least=1 if self.name == "steps" else 0)
            elif self.name != "guidance":
                check_finite(self.name, value)

    @property
    def headings(self) -> list[str]:
        """The labels of the values in the grid."""
        labels = self.labels or [self._written(value) for value in self.values]
        pairs = zip(labels, self.values, strict=True)
        return ["no guidance" if value is None else label for label, value in pairs]

    def _written(self, value: Any) -> str:
        if self.name == "guidance":
            return "none" if value is None else _called(value)
        names = {"cfg": "CFG {:g}", "scale": "scale {:g}", "seed": "seed {}", "steps": "{} steps"}
        return names.get(self.name, "{}").format(value)

    def __str__(self) -> str:
        """As the command line takes it."""
        # A comma can be part of a prompt.
        separator = "|" if self.name == "prompt" else ","
        shown = self.labels or [
            f"{value:g}" if isinstance(value, float) else str(value) for value in self.values
        ]
        return f"{self.name}={separator.join(shown)}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture of a grid that is to be drawn.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
        settings: All others.
        guidance: Its guidance.
    """

    prompt: str
    seed: int
    settings: GenerationSettings
    guidance: Guidance | GuidanceSum

    def at(self, axis: Axis, value: Any) -> Cell:
        """This cell with another value on an axis.

        Args:
            axis: Which setting.
            value: One of its values.

        Raises:
            ValueError: The value is outside its range.
        """
        if axis.name in ("prompt", "seed"):
            return replace(self, **{axis.name: value})
        if axis.name == "guidance" and value is not None:
            return replace(self, guidance=value)
        setting = _SETTINGS.get(axis.name, "sag_scale")
        changed = replace(self.settings, **{setting: 0.0 if value is None else value})
        return replace(self, settings=changed)


def cells_of(base: Cell, rows: Axis, columns: Axis) -> list[list[Cell]]:
    """The cells of a grid, row by row.

    Args:
        base: What no axis changes.
        rows: Down the grid.
        columns: Across it.

    Raises:
        ValueError: Both axes change the same.
    """
    if rows.name == columns.name:
        raise ValueError(f"rows and columns must differ: both are {rows.name}")

    def cell(row: Any, column: Any) -> Cell:
        changes = [(rows, row), (columns, column)]
        # No guidance is none at any scale.
        changes.sort(key=lambda change: change[0].name == "guidance")
        drawn = base
        for axis, value in changes:
            drawn = drawn.at(axis, value)
        return drawn

    return [[cell(row, column) for column in columns.values] for row in rows.values]


def _called(guidance: Guidance | GuidanceSum) -> str:
    from .metadata import method_label  # it imports numpy

    return f"{method_label(guidance.method)} {guidance.scale:g}"
