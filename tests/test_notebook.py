"""The notebook runs from top to bottom, offline, and is committed with what it draws."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "self_attention_guidance.ipynb"


def pictures(notebook: Any) -> list[Image.Image]:
    """What its cells drew; they say nothing else."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"display_data"}
    contents = (base64.b64decode(output.data["image/png"]) for output in outputs)
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]


def test_it_draws_now_what_is_in_it() -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert code[0].source.startswith("USE_STABLE_DIFFUSION = False\n")
    assert all(cell.outputs for cell in code[1:])
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    client: Any = NotebookClient(fresh, timeout=180, kernel_name="python3")
    asyncio.run(client.async_execute())  # its other way leaves an event loop open
    was, found = pictures(committed), pictures(fresh)
    assert len(was) == len(found) == len(code) - 1
    for one, other in zip(was, found, strict=True):
        assert one.size == other.size
        difference = np.abs(np.asarray(one, float) - np.asarray(other, float))
        # Another processor may round differently, and single pictures then change.
        assert difference.mean() < 10
        assert len(one.getcolors(2**20) or ()) > 200
