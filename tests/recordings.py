"""The recorded numbers of the original code, and networks loaded from its checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from self_attention_guidance import load_original

FOLDER = Path(__file__).parent / "data/originals"
KINDS = ("adm", "iddpm", "dit", "classifier")


def config(kind: str) -> dict[str, Any]:
    """The original constructor's arguments."""
    return json.loads((FOLDER / kind / "config.json").read_text(encoding="utf-8"))


def checkpoint(kind: str) -> Path:
    """The original checkpoint."""
    return FOLDER / kind / "model.pt"


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    """One file of recorded tensors; treat them as read-only."""
    return load_file(FOLDER / f"{name}.safetensors")


@functools.cache
def network(kind: str) -> nn.Module:
    """The loaded checkpoint; share it, and leave it as it is."""
    return load_original(kind, checkpoint(kind), config(kind))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a.double() - b.double()).abs().max().item()
