"""What this training takes from the first model's folder, which is made importable here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "emoji"))

import data
from denoiser import stratified_timesteps

__all__ = ["data", "stratified_timesteps"]
