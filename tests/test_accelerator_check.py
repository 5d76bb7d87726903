"""The check for accelerators, at tiny size: there may be no time to mend it on a borrowed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "accelerator" / "check.py"


def test_compiled_blocks_are_measured(tmp_path: Path) -> None:
    files = ["--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md"]
    size = ["--tiny", "--steps", "6", "--rounds", "1", "--backend", "eager"]
    command = [sys.executable, PROGRAM, *size, "--only", "sdxl-bfloat16-compiled", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    variants = case["variants"]
    assert list(variants) == ["none", "exact", "fast", "pag"]
    assert all(found["is_finite"] and found["seconds_a_step"] > 0 for found in variants.values())
    assert all(variants[name]["change"] > 0 for name in ("exact", "fast", "pag"))
    graphs = {name: found["graphs"] for name, found in variants.items()}
    assert case["graphs"] == sum(graphs.values())
    # The limit that a user of one method has.
    assert graphs["none"] + graphs["exact"] <= 8
    assert case["graph_breaks"] == case["recompilations"] == case["recompile_limit_reached"] == 0
    added = ", ".join(f"{name} {count}" for name, count in graphs.items())
    assert f"{case['graphs']} graphs ({added}), 0 breaks" in (tmp_path / "a.md").read_text()
