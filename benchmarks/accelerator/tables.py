"""Results as JSON, as lines and as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_COLUMNS = (
    "network",
    "type",
    "mode",
    "guidance",
    "ms a step",
    "ratio to none",
    "peak MiB",
    "waits a step",
    "finite",
)


def write_json(path: Path, report: Record) -> None:
    """Replace the report before, never by half of one."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    os.replace(beside, path)


def has_errors(report: Record) -> bool:
    """Whether a case, or a part of one, failed."""
    return any("error" in part for case in report["cases"] for part in _parts(case).values())


def _parts(case: Record) -> dict[str, Record]:
    return {"": case, **case.get("variants", {}), **case.get("agreement", {})}


def summary(case: Record) -> str:
    """A case in some lines."""
    took = f", {case['took']:.1f} s" if "took" in case else ""
    lines = [f"{case['name']}: {case['status']}{took}"]
    for name, record in case.get("variants", {}).items():
        cells = zip(_COLUMNS[4:], _cells(record), strict=True)
        lines.append(f"  {name}: " + ", ".join(f"{title} {cell}" for title, cell in cells))
    if "graphs" in case:
        lines.append(f"  {_graphs(case)}")
    for dtype, record in case.get("agreement", {}).items():
        found = ", ".join(f"{name} {_number(record.get(name), '.2e')}" for name in case["change"])
        lines.append(f"  {dtype} against float32: {found}")
    lines += [f"  {line}" for line in _errors(case)]
    return "\n".join(lines)


def markdown(report: Record) -> str:
    """All cases, as tables."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    done = [case for case in report["cases"] if case["status"] != "skipped"]
    rows = [
        (case["network"], case["dtype"], case["mode"], name, *_cells(record))
        for case in done
        for name, record in case.get("variants", {}).items()
    ]
    lines = [machine, "", *_table(_COLUMNS, rows), ""]
    lines += [f"- {case['name']}: {_graphs(case)}" for case in done if "graphs" in case]
    for case in done:
        if "agreement" in case:
            lines += ["", *_agreement(case)]
    lines += [f"- {case['name']}: {line}" for case in done for line in _errors(case)]
    left = [f"{c['name']} ({c['status']})" for c in report["cases"] if c["status"] != "done"]
    lines += ["", f"Not finished: {', '.join(left)}"] if left else []
    return "\n".join(lines) + "\n"


def _agreement(case: Record) -> list[str]:
    names = list(case["change"])
    rows = [
        (dtype, *(_number(record.get(name), ".2e") for name in names))
        for dtype, record in case["agreement"].items()
    ]
    changes = [_number(case["change"][name], ".2e") for name in names]
    rows.append(("what guidance changes in float32", *changes))
    return _table(("difference to float32", *names), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(record: Record) -> list[str]:
    if "error" in record:
        return ["failed", "", "", "", ""]
    seconds = record.get("seconds_a_step")
    return [
        _number(None if seconds is None else 1000 * seconds, ".1f"),
        _number(record.get("ratio"), ".3f"),
        _number(record.get("peak_mib"), ".0f"),
        _number(record.get("waits_a_step"), ".2f"),
        {True: "yes", False: "no"}.get(record.get("is_finite"), "-"),
    ]


def _graphs(case: Record) -> str:
    variants = {name: found.get("graphs") for name, found in case.get("variants", {}).items()}
    added = ", ".join(f"{name} {count}" for name, count in variants.items() if count is not None)
    total = f"{case['graphs']} graphs" + (f" ({added})" if added else "")
    return (
        f"{total}, {case['graph_breaks']} breaks, {case['recompilations']} compiled after the first"
        f" pictures, {case['recompile_limit_reached']} at the limit"
    )


def _errors(case: Record) -> list[str]:
    return [
        f"{name or 'all'} failed: {part['error'].splitlines()[0]}"
        for name, part in _parts(case).items()
        if "error" in part
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
