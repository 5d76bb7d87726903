"""A figure with the time ratios of all configurations."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from measuring import Result
from self_attention_guidance.evaluate.plot import check_plotting
from table import Report, title
from variants import VARIANTS

__all__ = ["check_plotting", "write_plot"]

_ROW_INCHES = 0.7
_SHOWN = tuple(name for name in VARIANTS if name != "none")


def write_plot(path: Path, report: Report) -> None:
    """Draws a row for each configuration: time over that without guidance, for each variant.

    Args:
        path: The `.png` file.
        report: What was measured.
    """
    # Without pyplot there is no window and no global state.
    module: Any = import_module("matplotlib.figure")
    height = 1.6 + _ROW_INCHES * len(report.results)
    figure: Any = module.Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=0.8)
    for row, result in enumerate(report.results):
        _draw_row(axes, row, result)
    names = [title(result.configuration) for result in report.results]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("time / time without guidance: median, quartiles, range", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    _draw_legend(figure, axes)
    figure.savefig(path, format="png", dpi=150)


def _draw_row(axes: Any, row: int, result: Result) -> None:
    for found in result.variants:
        if found.variant not in _SHOWN or found.over_none is None:
            continue
        place = _SHOWN.index(found.variant)
        ratio, y = found.over_none, row + 0.22 * (place - 1)
        color, label = f"C{place}", VARIANTS[found.variant]
        axes.hlines(y, ratio.low, ratio.high, color=color, linewidth=1)
        axes.hlines(y, ratio.lower_quartile, ratio.upper_quartile, color=color, linewidth=4)
        axes.plot(ratio.median, y, "o", color=color, markersize=5, label=label)


def _draw_legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    shown = [name for name in VARIANTS.values() if name in first]
    figure.legend(
        [first[name] for name in shown],
        shown,
        loc="outside upper center",
        ncols=len(_SHOWN),
        fontsize=8,
        frameon=False,
    )
