"""Limits for visitors. Nothing that they type becomes a path or the name of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checks import check_count, check_finite, check_text
from ..generate import Axis, GenerationSettings, check_scheduler_name, check_start, parse_axis
from ..guidance import METHODS
from ..guidance.text import parse_guidance

MOST_CHARACTERS = 2000
LARGEST_SEED = 2**32 - 1
_LARGEST_SCALE = 100.0
_LARGEST_SETTING = 1000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one visitor may ask for at once.

    Attributes:
        max_steps: Largest number of sampling steps.
        max_size: Largest side, in pixels.
        max_images: Largest number of pictures in a grid.
        max_queue: Largest number of waiting visitors; others are asked to try again later.

    Raises:
        ValueError: A limit is not a whole number of at least 1, or 8 pixels.
    """

    max_steps: int = 100
    max_size: int = 1024
    max_images: int = 24
    max_queue: int = 32

    def __post_init__(self) -> None:
        """Check every limit."""
        for field in fields(self):
            least = 8 if field.name == "max_size" else 1
            check_count(field.name, getattr(self, field.name), least)


@dataclass(frozen=True, kw_only=True)
class VisitorSettings:
    """The settings of a visitor; see `SelfAttentionGuidance`.

    Attributes:
        prompt: What to draw; may be empty.
        negative_prompt: What to guide away from.
        seed: 0 to 2**32 - 1.
        steps: Sampling steps.
        scheduler: A name of `scheduler_names`; an empty text is the model's own.
        guidance_scale: Scale of classifier-free guidance; 1 or less is off.
        sag_scale: Scale of self-attention guidance.
        blur_sigma: Width of the blur, in pixels of the denoiser's input.
        threshold: Positions that receive more attention than this are blurred.
        start: Start of the guided part of the steps, 0 to 1.
        stop: End of the guided part.
        every: Steps from one second pass to the next.
        size: Pixels of a side, a multiple of 8; 0 is the model's own.
        method: Short name of the guidance; an empty text is the model's own.
        layers: The layers to weaken, with plus signs between, for methods that weaken layers;
            empty is the default.
        image: File of the picture to begin with; `None` begins with noise.
        mask: File of a picture that is white where `image` is redrawn; `None` redraws all of it.
        strength: How much of `image` is changed, above 0, at most 1.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    scheduler: str
    guidance_scale: float
    sag_scale: float
    blur_sigma: float
    threshold: float
    start: float
    stop: float
    every: int
    size: int
    method: str = ""
    layers: str = ""
    image: str | None = None
    mask: str | None = None
    strength: float = 0.8

    def generation(self) -> GenerationSettings:
        """The settings that do not belong to guidance.

        Raises:
            ValueError: A setting is outside its range.
        """
        return GenerationSettings(
            negative_prompt=self.negative_prompt,
            sag_scale=self.sag_scale,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.steps,
            width=self.size or None,
            height=self.size or None,
            image=self.image,
            mask=self.mask,
            strength=self.strength if self.image else None,
        )

    def check(self, limits: Limits) -> None:
        """Refuse what is outside the limits; the guidance checks its own settings.

        Args:
            limits: The limits of this page.

        Raises:
            ValueError: A setting is outside the limits; the message names it and the rule.
        """
        for name in ("prompt", "negative_prompt", "layers"):
            text = check_text(name, getattr(self, name))
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"{name} must have at most {MOST_CHARACTERS} characters")
        _check_most("steps", check_count("steps", self.steps), limits.max_steps)
        _check_most("seed", check_count("seed", self.seed, least=0), LARGEST_SEED)
        for name in ("guidance_scale", "sag_scale"):
            check_scale(name, getattr(self, name))
        if self.size:
            _check_most("size", check_count("size", self.size), limits.max_size)
        if check_text("scheduler", self.scheduler):
            check_scheduler_name(self.scheduler)
        if check_text("method", self.method) and self.method not in METHODS:
            raise ValueError(f"method={self.method!r:.60} must be one of {', '.join(METHODS)}")
        check_start(self.generation(), limits.max_size)


def check_scale(name: str, scale: float) -> float:
    """Refuse a guidance scale that must be a mistake.

    Args:
        name: Name of the control.
        scale: Its value.

    Raises:
        ValueError: It is not finite, or not from -100 to 100.
    """
    if abs(check_finite(name, scale)) > _LARGEST_SCALE:
        raise ValueError(f"{name}={scale:g} must be between -100 and 100")
    return scale


def check_axes(
    rows: str, row_values: str, columns: str, column_values: str, limits: Limits
) -> tuple[Axis, Axis]:
    """The sides of a grid, as `parse_axis` reads them.

    Args:
        rows: Name of the setting that changes from row to row.
        row_values: Its values.
        columns: Name of the setting that changes from column to column.
        column_values: Its values.
        limits: The limits of this page.

    Raises:
        ValueError: A value is outside the limits, or the grid has too many pictures.
    """
    given = {"rows": (rows, row_values), "columns": (columns, column_values)}
    axes = [_checked_axis(side, *texts, limits) for side, texts in given.items()]
    _check_most("pictures", len(axes[0].values) * len(axes[1].values), limits.max_images)
    return axes[0], axes[1]


def _checked_axis(side: str, name: str, text: str, limits: Limits) -> Axis:
    if len(check_text(side, text)) > MOST_CHARACTERS:
        raise ValueError(f"{side} must have at most {MOST_CHARACTERS} characters")
    axis = parse_axis(side, f"{name}={text}")
    guidances = [text for text in axis.values if text is not None and name == "guidance"]
    for text in guidances:
        _check_guidance(parse_guidance(text))
    for value in axis.values:
        if name in ("scale", "cfg", "blur") and value != math.inf:
            check_scale(name, value)
        elif name in ("steps", "seed"):
            _check_most(name, value, limits.max_steps if name == "steps" else LARGEST_SEED)
    return axis


def _check_guidance(settings: Mapping[str, Any]) -> None:
    """Limit the time and memory that guidance takes: each one is a pass of the network."""
    several = settings.get("guidances", [settings])
    _check_most("guidances", len(several), len(METHODS))
    for name, value in (pair for each in several for pair in each.items()):
        if isinstance(value, int | float) and _LARGEST_SETTING < abs(value) < math.inf:
            raise ValueError(f"{name}={value:g} must be at most {_LARGEST_SETTING} on this page")


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(f"{name}={value} must be at most {most} on this page")
