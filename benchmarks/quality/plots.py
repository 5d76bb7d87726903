"""The study's plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from points import FEW_STEPS, MODELS, UNGUIDED, Point
from results import Result

Measured = tuple[Point, Result]
_PANEL = (4.6, 3.7)


def write(measured: Sequence[Measured], folder: Path) -> None:
    """Draw `frontier.png` and `scales.png` into a folder."""
    for group, draw, name in (
        ("headline", _draw_frontier, "frontier.png"),
        ("scale", _draw_scales, "scales.png"),
    ):
        chosen = [model for model in MODELS if _is_measured(measured, model, group)]
        if chosen:
            _figure(measured, chosen, draw).savefig(folder / name, dpi=110)


def _is_measured(measured: Sequence[Measured], model: str, group: str) -> bool:
    return any((point.model, point.group) == (model, group) for point, _ in measured)


def _figure(measured: Sequence[Measured], models: Sequence[str], draw: Any) -> Any:
    """A panel for each model."""
    # Without pyplot there is no window and no global state.
    module: Any = import_module("matplotlib.figure")
    width, height = _PANEL
    figure: Any = module.Figure(figsize=(width * len(models), height), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        draw(axes, model, [m for m in measured if m[0].model == model])
        axes.set_title(model, fontsize=10)
        axes.set_ylabel("Fréchet distance (lower is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure


def _draw_frontier(axes: Any, name: str, measured: Sequence[Measured]) -> None:
    """Fréchet distance against what a sample costs; unguided sampling is a line."""
    model = MODELS[name]
    every = [dataclasses.replace(model.exact, every=every) for every in (2, 3)]
    kinds = (
        (UNGUIDED, "unguided, more steps", "o-"),
        (model.fast, "fast preset, more steps", "D-"),
        (model.exact, "SAG at every step", "s-"),
        (model.held, f"a second pass every {model.held.every} steps, more steps", "P"),
        (every[0], "a second pass every 2 steps", "^"),
        (every[1], "a second pass every 3 steps", "v"),
    )
    for number, (guidance, label, marker) in enumerate(kinds):
        chosen = [m for m in measured if m[0].guidance == guidance and _is_shown(m[0])]
        chosen.sort(key=lambda m: m[1].rows)
        _draw_points(axes, chosen, lambda m: m[1].rows, label, marker, f"C{number}")
    axes.set_xlabel("rows of the network for one sample", fontsize=8)
    axes.legend(fontsize=7)


def _draw_scales(axes: Any, name: str, measured: Sequence[Measured]) -> None:
    """Fréchet distance against the scale of exact guidance."""
    chosen = [
        m
        for m in measured
        if m[0].group == "scale"
        or m[0].label == "attention's mask"
        or (m[0].guidance.scale == 0 and m[0].steps == FEW_STEPS and _is_shown(m[0]))
    ]
    chosen.sort(key=lambda m: m[1].scale)
    _draw_points(
        axes, chosen, lambda m: m[1].scale, f"SAG at each of {FEW_STEPS} steps", "o-", "C0"
    )
    axes.set_xlabel("scale", fontsize=8)
    axes.legend(fontsize=7)


def _is_shown(point: Point) -> bool:
    """Whether it is unconditional, and not a point that was measured again with more samples."""
    return not point.conditional and point.scheduler is None and point.times == 1


def _draw_points(
    axes: Any, measured: Sequence[Measured], x: Any, label: str, marker: str, colour: str
) -> None:
    if not measured:
        return
    found = [result.estimate("frechet_distance") for _, result in measured]
    values = [one.value for one in found]
    low = [one.value - (one.value if one.low is None else one.low) for one in found]
    high = [(one.value if one.high is None else one.high) - one.value for one in found]
    axes.errorbar(
        [x(m) for m in measured],
        values,
        yerr=[low, high],
        fmt=marker,
        color=colour,
        capsize=3,
        label=label,
    )
