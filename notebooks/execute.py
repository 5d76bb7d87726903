"""Run the notebook and keep what it draws: `python notebooks/execute.py`, from the repository.

With two arguments, run the first one and write what comes out to the second one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "self_attention_guidance.ipynb"
SECONDS = 300


def execute(source: Path, target: Path) -> None:
    """Run a notebook in a fresh kernel of this interpreter.

    Args:
        source: The notebook.
        target: Where it goes, with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
        nbclient.exceptions.CellTimeoutError: A cell took longer than `SECONDS`.
    """
    notebook = nbformat.read(source, as_version=4)
    # Without times and versions, so that only what changed differs.
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, target)


if __name__ == "__main__":
    execute(*(map(Path, sys.argv[1:3]) if sys.argv[1:] else (NOTEBOOK, NOTEBOOK)))
