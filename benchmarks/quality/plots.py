"""The study's plots: one frontier for each task."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report import Row

_COLOURS = {
    "none": "black",
    "sag": "C0",
    "pag": "C1",
    "seg": "C2",
    "slg": "C4",
    "tpg": "C3",
    "blur": "C5",
    "sag+pag": "C9",
}
# By whether it is a fast preset, and whether it has the better sampler.
_MARKERS = {(False, False): "o", (True, False): "^", (False, True): "s", (True, True): "D"}
_INCHES_PER_ROW = 0.19


def draw_frontier(title: str, budgets: Sequence[tuple[str, list[Row]]], path: Path) -> None:
    """Draw Fréchet distance against network evaluations for one sample.

    Args:
        title: As in `frontier`.
        budgets: As in `frontier`.
        path: A PNG file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frontier(title, budgets).savefig(path, dpi=110)


def frontier(title: str, budgets: Sequence[tuple[str, list[Row]]]) -> Any:
    """Two panels: on the left distances by cost, on the right their intervals, row by row.

    Sampling without guidance is a line on the left. A method that lies below it is worth more than
    as many evaluations spent on steps. Methods of the same cost would hide each other's intervals
    there, so these have a row each, which is the legend, too.

    Args:
        title: Of the plot.
        budgets: Titles of budgets, and what was measured at each.

    Returns:
        A figure of matplotlib.
    """
    listed = [(name, rows) for name, rows in budgets if len(rows) > 1]
    count = sum(len(rows) + 1 for _, rows in listed)
    # Without pyplot there is no window and no global state.
    module: Any = import_module("matplotlib.figure")
    size = (9, max(4.2, 1.0 + _INCHES_PER_ROW * count))
    figure: Any = module.Figure(figsize=size, layout="constrained")
    by_cost, by_row = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_costs(by_cost, [row for _, rows in budgets for row in rows])
    _draw_intervals(by_row, listed)
    figure.suptitle(title, fontsize=10)
    return figure


def look(method: str) -> tuple[str, str]:
    """Colour and marker of a method; no two methods have both the same.

    Args:
        method: Its name in the study.
    """
    name = method.removesuffix("-dpm++")
    kind = name.removesuffix("-fast")
    return _COLOURS[kind], _MARKERS[kind != name, name != method]


def _draw_costs(axes: Any, rows: list[Row]) -> None:
    unguided = sorted(
        (row for row in rows if row.point.method == "none"),
        key=lambda row: row.result.setting.evaluations,
    )
    found = [row.result.estimate("frechet_distance") for row in unguided]
    axes.errorbar(
        [row.result.setting.evaluations for row in unguided],
        [one.value for one in found],
        yerr=_spread(found),
        fmt="-",
        color="black",
        linewidth=1,
        capsize=2,
    )
    for row in rows:
        colour, marker = look(row.point.method)
        axes.plot(
            row.result.setting.evaluations,
            row.result.estimate("frechet_distance").value,
            marker,
            color=colour,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
    axes.set_xlabel("network evaluations for one sample", fontsize=9)
    axes.set_ylabel("Fréchet distance (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _draw_intervals(axes: Any, budgets: Sequence[tuple[str, list[Row]]]) -> None:
    labels: list[str] = []
    for name, rows in budgets:
        axes.text(0.01, len(labels), name, fontsize=8, transform=axes.get_yaxis_transform())
        labels.append("")
        for row in rows:
            found = row.result.estimate("frechet_distance")
            colour, marker = look(row.point.method)
            axes.errorbar(
                found.value,
                len(labels),
                xerr=_spread([found]),
                fmt=marker,
                color=colour,
                capsize=2,
                markersize=5,
                linewidth=1,
            )
            labels.append(f"{row.title}, {row.result.setting.evaluations}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.8)
    axes.set_xlabel(
        "Fréchet distance, 95 % interval\n(after each name: network evaluations)", fontsize=9
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)


def _spread(found: Sequence[Any]) -> list[list[float]]:
    low = [one.value - (one.value if one.low is None else one.low) for one in found]
    high = [(one.value if one.high is None else one.high) - one.value for one in found]
    return [low, high]
