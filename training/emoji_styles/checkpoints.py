"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], file: Path) -> None:
    """Write `state`, under another name first: a stop in between leaves the old file."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)
