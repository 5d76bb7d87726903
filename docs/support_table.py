"""Write the table of supported pipelines from what test runs reported.

python docs/support_table.py OLDEST.json NEWEST.json docs/support.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PROPERTIES = {
    "runs": "guided, no trace",
    "formula": "equals the formula",
    "batch": "batch-independent",
    "compile": "compiled",
    "offload": "offloaded",
    "pag": "PAG",
    "seg": "SEG",
    "slg": "SLG",
    "tpg": "TPG",
}
INTRODUCTION = """# Supported pipelines

`make support-table` writes this page from two runs of the tests, with the oldest and the newest
supported diffusers. They are {oldest} (transformers {old_transformers}) and {newest}
(transformers {new_transformers}). Both ran with torch {torch} on a CPU, on tiny networks with
random weights.

- **guided, no trace**: guidance changes the result. At scale 0, and after guidance was removed,
  the result is the same bit for bit.
- **equals the formula**: the guided prediction agrees with an independent implementation in the
  tests. That one computes attention and the second pass explicitly. The relative difference is
  under 1e-4.
- **batch-independent**: a picture is the same in a batch and alone.
- **compiled**: it works with `torch.compile`, in whole graphs. Nothing is compiled after the
  second run.
- **offloaded**: every picture is guided while accelerate moves the weights.
- **PAG**, **SEG**, **SLG**, **TPG**: the [method](guidance-methods.md) leaves no trace, and is
  batch-independent where the network is. Except for special tasks (inpainting, ControlNet, ...),
  it also agrees with a plain implementation of its paper's equations within 1e-4.

The first five columns are about SAG.

✓ means that both versions work, a version number that only this version works, and ✗ that neither
works. An empty cell means that there is no separate test. Lumina 2 and HiDream have no whole graph,
guided or not, because they read numbers from the device in the middle of a pass.
"""


def cell(outcomes: list[bool | None], versions: list[str]) -> str:
    """One cell of the table, from the outcomes of each version's tests."""
    working = [version for version, passed in zip(versions, outcomes, strict=True) if passed]
    if len(working) == len(versions):
        return "✓"
    return ", ".join(working) or ("" if set(outcomes) == {None} else "✗")


def page(reports: list[dict[str, Any]]) -> str:
    """The page, from the reports of the oldest and the newest versions."""
    oldest, newest = (report["versions"] for report in reports)
    versions = [oldest["diffusers"], newest["diffusers"]]
    lines = [
        INTRODUCTION.format(
            oldest=versions[0],
            newest=versions[1],
            old_transformers=oldest["transformers"],
            new_transformers=newest["transformers"],
            torch=newest["torch"],
        ),
        "| pipeline | " + " | ".join(PROPERTIES.values()) + " |",
        "|---" * (len(PROPERTIES) + 1) + "|",
    ]
    for pipeline in sorted(reports[1]["pipelines"]):
        rows = [report["pipelines"].get(pipeline, {}) for report in reports]
        cells = [cell([row.get(name) for row in rows], versions) for name in PROPERTIES]
        lines.append(f"| {pipeline} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read two reports, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("oldest", type=Path)
    parser.add_argument("newest", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in (options.oldest, options.newest)]
    options.page.write_text(page(reports))


if __name__ == "__main__":
    main()
