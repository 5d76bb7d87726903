"""A figure with all sets of samples: one panel for each figure, with intervals."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..generate.files import whole_file
from .measuring import METRICS, Metric
from .report import Report, SampleReport, footnote

_PANEL_INCHES = 2.6
_ROW_INCHES = 0.32
_LINE_INCHES = 0.13
_COLUMNS = 3
# A name with two dollar signs is no mathematics.
_PLAIN: dict[str, Any] = {"parse_math": False}
# Width of the notes below the panels.
_LETTERS_PER_INCH = 18


def check_plotting() -> None:
    """Raise an error if matplotlib is missing.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error


def write_plot(path: Path, report: Report) -> None:
    """Draw the figure.

    Args:
        path: The `.png` file.
        report: The results.
    """
    # Not pyplot, which has windows and global state.
    module: Any = import_module("matplotlib.figure")
    known = [
        metric
        for metric in METRICS
        if any(metric.key in sample.metrics for sample in report.samples)
    ]
    columns = min(_COLUMNS, len(known))
    rows = -(-len(known) // columns)
    width = columns * _PANEL_INCHES + 1.2
    remarks = [footnote(report), *(f"Warning: {each}" for each in report.warnings)]
    lines = [line for each in remarks for line in wrap(each, int(_LETTERS_PER_INCH * width))]
    height = rows * (1.1 + _ROW_INCHES * len(report.samples)) + _LINE_INCHES * len(lines)
    figure: Any = module.Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, metric in zip(grid.flat, known, strict=False):
        _draw_panel(axes, metric, report.samples)
    for axes in list(grid.flat)[len(known) :]:
        axes.set_visible(False)
    notes = _printable("\n".join(lines))
    figure.supxlabel(notes, x=0.01, horizontalalignment="left", fontsize=7, **_PLAIN)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_panel(axes: Any, metric: Metric, samples: Any) -> None:
    for row, sample in enumerate(samples):
        _draw_estimate(axes, metric, row, sample)
    axes.set_title(f"{metric.title} ({metric.better} is better)", fontsize=8)
    names = [_printable(sample.name) for sample in samples]
    axes.set_yticks(range(len(samples)), names, fontsize=8, **_PLAIN)
    axes.set_ylim(len(samples) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)


def _printable(text: str) -> str:
    """Names of files may be no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _draw_estimate(axes: Any, metric: Metric, row: int, sample: SampleReport) -> None:
    found = sample.metrics.get(metric.key)
    if found is None:
        return
    spread = None
    if found.low is not None and found.high is not None:
        spread = [[found.value - found.low], [found.high - found.value]]
    axes.errorbar(found.value, row, xerr=spread, fmt="o", color=f"C{row}", capsize=3, markersize=4)
