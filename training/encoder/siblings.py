"""What this training takes from the models' folders, which are made importable here."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind this folder: they have a learning.py and a train.py, too.
sys.path.append(str(Path(__file__).parents[1] / "emoji_adm"))

import classes
from shared import data

__all__ = ["classes", "data"]
