"""The results of an evaluation, as a table and as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .loading import LoadedSet
from .measuring import METRICS
from .resampling import Estimate

_ARROWS = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True)
class SampleReport:
    """The figures of one set of samples.

    Attributes:
        name: Short name in tables and plots.
        path: The folder or file of the set.
        count: Number of pictures.
        metrics: Estimates by `Metric.key`.
    """

    name: str
    path: Path
    count: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        reference: The set that the samples were compared with.
        encoder: Name of the encoder of the features.
        repetitions: Number of halves for the intervals.
        seed: Seed of the halves.
        samples: Results of one or more sets.
        warnings: Sentences that a reader must know; see `advice`.
    """

    reference: LoadedSet
    encoder: str
    repetitions: int
    seed: int
    samples: Sequence[SampleReport]
    warnings: Sequence[str] = ()


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of paths without folder and suffix, or the whole paths if these are not unique.

    Args:
        paths: Folders and files.
    """
    # "." and ".." have no name of their own.
    stems = [Path(os.path.abspath(path)).name.removesuffix(".npz") for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def format_estimate(found: Estimate | None, form: str = ".4g") -> str:
    """An estimate like "12.3 [11.9, 12.8]".

    Args:
        found: The estimate; `None` gives "-".
        form: The form of each number.
    """
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def format_table(report: Report) -> str:
    """A table with a row for each figure and a column for each set; arrows mean better.

    Args:
        report: The results.
    """
    rows = [
        ["", *(sample.name for sample in report.samples)],
        ["pictures", *(str(sample.count) for sample in report.samples)],
    ]
    for metric in METRICS:
        found = [sample.metrics.get(metric.key) for sample in report.samples]
        if any(found):
            title = f"{metric.title} {_ARROWS[metric.better]}"
            rows.append([title, *map(format_estimate, found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([*lines, footnote(report)])


def footnote(report: Report) -> str:
    """The settings of the evaluation, in one line.

    Args:
        report: The results.
    """
    features = report.reference.features
    count = "" if features is None else f", {len(features.features)} pictures"
    intervals = ""
    if report.repetitions > 1:
        intervals = f"; 95 % intervals from {report.repetitions} random halves of the samples"
    return f"reference: {report.reference.path}{count}; features: {report.encoder}{intervals}"


def as_json(report: Report) -> dict[str, Any]:
    """The results as JSON values.

    Args:
        report: The results.

    Returns:
        What `json.dumps` takes.
    """
    features = report.reference.features
    return {
        "reference": {
            "path": str(report.reference.path),
            "count": None if features is None else len(features.features),
        },
        "features": report.encoder,
        "bootstrap": report.repetitions,
        "seed": report.seed,
        "warnings": list(report.warnings),
        "samples": [
            {
                "name": sample.name,
                "path": str(sample.path),
                "count": sample.count,
                "metrics": {key: asdict(found) for key, found in sample.metrics.items()},
            }
            for sample in report.samples
        ],
    }
