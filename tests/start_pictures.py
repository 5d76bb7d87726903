"""Fixtures: a picture to begin with, and a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A picture of 72 x 64 pixels, every one another."""
    values = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    return tmp_path / "start.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White in the left half."""
    white = np.zeros((64, 72), np.uint8)
    white[:, :36] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"
