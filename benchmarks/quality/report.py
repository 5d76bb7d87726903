"""Write the study's tables into the pages that show them, and draw its plots.

A page holds `<!-- study: NAME -->` and `<!-- end -->`; what stands between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import plots
import results
from points import Point, points
from results import Result
from self_attention_guidance.evaluate import Estimate

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quality.md", "docs/what-did-not-work.md")
_BLOCK = re.compile(r"(<!-- study: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Measured = tuple[Point, Result]


def write_report() -> None:
    """Write all tables and plots from what was measured so far."""
    found = [(point, results.read(point)) for point in points()]
    measured = [(point, result) for point, result in found if result is not None]
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        text = _BLOCK.sub(lambda block: _filled(block, measured), text)
        path.write_text(text, encoding="utf-8")
    plots.write(measured, ROOT / "docs" / "images")


def _filled(block: re.Match[str], measured: Sequence[Measured]) -> str:
    group = block[2]
    lines = summary(measured) if group == "summary" else table(measured, group)
    if not any(point.group == group for point, _ in measured) and group != "summary":
        lines = ["Not measured yet."]
    return block[1] + "\n" + "\n".join(lines) + "\n\n" + block[3]


def table(measured: Sequence[Measured], group: str) -> Iterator[str]:
    """A Markdown table of the points of one group, each against its unguided point."""
    yield (
        "| Model | Guidance | Scale | Steps | Rows | Size of the term | Fréchet distance ↓ "
        "| against unguided | precision ↑ | against unguided | recall ↑ | pictures |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- | ---: |"
    for point, result in measured:
        if point.group == group:
            other = unguided(measured, point)
            yield _row(point, result, None if other is result else other)


def _row(point: Point, result: Result, other: Result | None) -> str:
    size = "" if result.term_size is None else f"{result.term_size:.3f}"
    changes = [
        "" if other is None else signed(result.gain(key, other), digits)
        for key, digits in (("frechet_distance", 2), ("precision", 3))
    ]
    cells = [
        point.model,
        point.label,
        f"{result.scale:g}",
        str(point.steps),
        f"{result.rows:g}",
        size,
        interval(result.estimate("frechet_distance"), 2),
        changes[0],
        interval(result.estimate("precision"), 3),
        changes[1],
        interval(result.estimate("recall"), 3),
        str(result.count),
    ]
    return f"| {' | '.join(cells)} |"


def summary(measured: Sequence[Measured]) -> Iterator[str]:
    """The table of README: Fréchet distances of unconditional samples."""
    models = list(dict.fromkeys(point.model for point, _ in measured))
    names = " | ".join(f"`{model}`" for model in models)
    yield f"| Fréchet distance ↓ | {names} | network evaluations |"
    yield f"| --- |{' --- |' * len(models)} ---: |"
    titles = {
        "unguided": "no guidance",
        "exact": "SAG at every step",
        "fast": "fast preset",
        "unguided, twice the steps": "no guidance, twice the steps",
    }
    for label, title in titles.items():
        found = {
            point.model: result
            for point, result in measured
            if point.group == "headline" and point.label == label
        }
        if not found:
            continue
        figures = " | ".join(
            interval(found[model].estimate("frechet_distance"), 1)
            if model in found
            else "not measured yet"
            for model in models
        )
        rows = " · ".join(dict.fromkeys(f"{result.rows:g}" for result in found.values()))
        yield f"| {title} | {figures} | {rows} |"


def unguided(measured: Sequence[Measured], point: Point) -> Result | None:
    """The unguided point that differs from `point` in nothing but guidance."""
    for other, result in measured:
        is_same = all(
            getattr(other, name) == getattr(point, name)
            for name in ("model", "steps", "scheduler", "conditional", "guidance_scale", "times")
        )
        if is_same and other.guidance.scale == 0:
            return result
    return None


def interval(found: Estimate, digits: int) -> str:
    """An estimate like "12.3 [11.9, 12.8]"."""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def signed(found: Estimate, digits: int) -> str:
    """A difference like "-3.1 [-3.5, -2.7]"; bold if its interval excludes zero."""
    assert found.low is not None
    assert found.high is not None
    text = f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text
