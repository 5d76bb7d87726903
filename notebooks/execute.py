"""Run the notebook and keep what it draws: `python notebooks/execute.py`, from the repository."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "self_attention_guidance.ipynb"


def executed(notebook: Any, timeout: int = 180) -> Any:
    """Run a notebook in a fresh kernel of this interpreter.

    Args:
        notebook: As nbformat reads it; it is filled with its outputs.
        timeout: Seconds that one cell may take.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
        nbclient.exceptions.CellTimeoutError: A cell took too long.
    """
    # Without times and versions, so that only what changed differs.
    client: Any = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False
    )
    asyncio.run(client.async_execute())  # its other way leaves an event loop open
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4)), NOTEBOOK)
