"""The study's plots: one frontier for each task."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report import Row

# For the methods other than none, which is black. Both lists are begun again where they end; their
# lengths differ, so that no two methods look the same.
_MARKERS = "sDP^vX*<>hdp"
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "gold", "navy", "gray", "teal")
# Methods of one budget stand beside each other, spread over so many evaluations.
_SPREAD = 8.0


def draw_frontier(title: str, budgets: Sequence[tuple[str, list[Row]]], path: Path) -> None:
    """Draw Fréchet distance against network evaluations for one sample.

    Sampling without guidance is a line. A method that lies below it is worth more than as many
    evaluations spent on steps.

    Args:
        title: Of the plot.
        budgets: Names of budgets, and what was measured at each.
        path: A PNG file to write.
    """
    beside = {
        row.point: (number - (len(each) - 1) / 2) * _SPREAD / max(len(each), 8)
        for _, each in budgets
        for number, row in enumerate(r for r in each if r.point.method != "none")
    }
    rows = [row for _, each in budgets for row in each]
    # Without pyplot there is no window and no global state.
    module: Any = import_module("matplotlib.figure")
    figure: Any = module.Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row.point.method for row in rows))
    methods.sort(key=lambda method: method != "none")  # the others stay in their order
    for number, method in enumerate(methods):
        chosen = [row for row in rows if row.point.method == method]
        chosen.sort(key=lambda row: row.result.setting.evaluations)
        if method == "none":
            _draw_points(axes, chosen, [0.0] * len(chosen), "o-", "black")
            continue
        looks = (each[(number - 1) % len(each)] for each in (_MARKERS, _COLOURS))
        _draw_points(axes, chosen, [beside[row.point] for row in chosen], *looks)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("network evaluations for one sample", fontsize=9)
    axes.set_ylabel("Fréchet distance (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_points(axes: Any, rows: list[Row], shifts: list[float], style: str, colour: str) -> None:
    found = [row.result.estimate("frechet_distance") for row in rows]
    low = [one.value - (one.value if one.low is None else one.low) for one in found]
    high = [(one.value if one.high is None else one.high) - one.value for one in found]
    axes.errorbar(
        [row.result.setting.evaluations + n for row, n in zip(rows, shifts, strict=True)],
        [one.value for one in found],
        yerr=[low, high],
        fmt=style,
        color=colour,
        capsize=2,
        markersize=5,
        label=rows[0].title,
    )
