"""The notebook runs from top to bottom, offline, and is committed with what it draws."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import matplotlib_inline.backend_inline
import nbformat
import numpy as np
import pytest
import transformers
from PIL import Image

from self_attention_guidance.models.builtin import builtin_folder

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "self_attention_guidance.ipynb"
FLAG = "USE_STABLE_DIFFUSION = "
EFFECTS = """
import numpy as np

pairs = [(unguided, guided), (before, after), (drawn["unguided"][0], drawn["fast"][0])]
small = [(columns[0], column) for column in columns[1:]] + [(without, nearer)]
for least, lists in [(0.5, pairs), (0.1, small)]:
    for one, other in (pair for both in lists for pair in zip(*both, strict=True)):
        assert np.abs(np.subtract(one, other, dtype=float)).mean() > least
assert [count for _, count in drawn.values()] == [25, 50, 29]
assert len({method for guidances in methods.values() for method in map(type, guidances)}) == 6
assert not handle.attached
"""
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook, run as `make notebook` runs it, in a process of its own."""
    source, target = folder / "source.ipynb", folder / "target.ipynb"
    nbformat.write(notebook, source)
    program = [sys.executable, NOTEBOOK.with_name("execute.py"), source, target]
    done = subprocess.run(program, capture_output=True, text=True, cwd=NOTEBOOK.parents[1])
    assert done.returncode == 0, done.stderr
    return nbformat.read(target, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text(notebook: Any) -> list[str]:
    return [output.text for output in outputs(notebook) if output.output_type == "stream"]


def pictures(notebook: Any) -> list[np.ndarray]:
    """What it draws, (height, width, 3); it may print, but neither warn nor fail."""
    found = []
    for output in outputs(notebook):
        if output.output_type == "stream":
            assert output.name == "stdout", output.text
            continue
        assert output.output_type == "display_data", output
        content = base64.b64decode(output.data["image/jpeg"])
        found.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=float))
    return found


def test_it_is_committed_for_the_builtin_model_with_its_outputs() -> None:
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source
    assert code[1].source.startswith(f"{FLAG}False\n")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        shows = any(line.startswith(("show(", "plt.show(")) for line in cell.source.splitlines())
        drawn = [output for output in cell.outputs if "image/jpeg" in output.get("data", {})]
        assert len(drawn) == shows


def test_the_file_is_small_and_names_no_place_or_time() -> None:
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert len(content) < 1_000_000
    readable = " ".join([*text(read()), *(cell.source for cell in read().cells)])
    assert str(Path.home()) not in readable
    assert "site-packages" not in readable
    assert "iopub" not in content  # when each cell ran


def test_its_links_have_ends() -> None:
    words = " ".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((\.\.[^)\s]*)\)", words)
    assert targets
    assert all((NOTEBOOK.parent / target.partition("#")[0]).exists() for target in targets)


def test_it_draws_now_what_is_in_it(tmp_path: Path) -> None:
    committed, fresh = read(), read()
    fresh.cells.append(nbformat.v4.new_code_cell(EFFECTS))
    fresh = executed(fresh, tmp_path)
    assert text(fresh) == text(committed)
    was, found = pictures(committed), pictures(fresh)
    assert len(was) == len(found) == 10
    for one, other in zip(was, found, strict=True):
        # Fonts differ by a pixel between versions of matplotlib.
        assert np.abs(np.subtract(one.shape, other.shape)).max() <= 4
        height, width, _ = np.minimum(one.shape, other.shape)
        # Another processor may round differently, and single pictures then change.
        assert np.abs(one[:height, :width] - other[:height, :width]).mean() < 10
        for picture in (one, other):
            assert picture.std() > 20
            assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200


def test_the_flag_asks_for_stable_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here: the builtin model stands for the other one, in the first section."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for owner, name in [
        (matplotlib_inline.backend_inline, "set_matplotlib_formats"),
        (diffusers.utils.logging, "disable_progress_bar"),
        (transformers.utils.logging, "disable_progress_bar"),
    ]:
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    code = [cell.source for cell in read().cells if cell.cell_type == "code"]
    assert code[1].count(f"{FLAG}False") == code[1].count(f'"{HUB_ID}"') == 1
    code[1] = code[1].replace(f"{FLAG}False", f"{FLAG}True")
    code[1] = code[1].replace(f'"{HUB_ID}"', repr(str(builtin_folder("emoji"))))
    code[1] = code[1].replace("STEPS = 25", "STEPS = 5")
    code[3] = code[3].replace("show(", "shown = (")
    names: dict[str, Any] = {}
    for cell in code[1:4]:
        exec(cell, names)
    assert names["CFG"] == 7.5
    rows, _, prompts = names["shown"]
    assert prompts == ["a corgi", "a bowl of fruit", "a lighthouse", "a robot"]
    unguided, guided = (np.stack([np.asarray(each) for each in row]) for row in rows)
    assert np.abs(np.subtract(guided, unguided, dtype=float)).mean() > 0.5
