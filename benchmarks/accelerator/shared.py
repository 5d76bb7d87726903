"""What this check takes from the benchmark of cost, whose folder is made importable here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cost"))

from random_networks import default_dtype, sd15_unet, sdxl_unet, sharpen
from timing import ratios, spread, time_rounds

__all__ = [
    "default_dtype",
    "ratios",
    "sd15_unet",
    "sdxl_unet",
    "sharpen",
    "spread",
    "time_rounds",
]
