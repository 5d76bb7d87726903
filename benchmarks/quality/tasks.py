"""What is drawn: four tasks on two builtin models, and what their samples are compared with."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from judging import HeldOut, data, held_out
from self_attention_guidance.evaluate import load_encoder
from self_attention_guidance.models.builtin import builtin_folder

CLASSES = 23
_REFERENCES = Path(__file__).parent / "references"
# So many held-out captions are the search's; the report asks for the others.
_SEARCHED = 200
# Held-out pictures are compared on so many backgrounds each.
_BACKGROUNDS_EACH = 3


@dataclass(frozen=True)
class Task:
    """One way to draw with a builtin model.

    Attributes:
        name: Short, for files and the command line.
        title: For tables and plots.
        model: The builtin model.
        conditional: Whether captions, or classes, are given.
        has_cfg: Whether classifier-free guidance is used.
        earliest: The least `start` of guidance that is searched. On `emoji-adm`, guidance of the
            first steps does great harm: they see hardly more than noise.
        layers: The layers that are searched, by method; `None` is the method's default.
    """

    name: str
    title: str
    model: str
    conditional: bool
    has_cfg: bool
    earliest: float
    layers: dict[str, tuple[str | None, ...]]

    @property
    def has_captions(self) -> bool:
        """Whether a judge can say what is right of a sample."""
        return self.model == "emoji-styles" and self.conditional

    def description(self) -> dict[str, Any]:
        """All of the task that decides what is drawn, for JSON."""
        return {
            "task": self.name,
            "weights": _digest_of_weights(self.model),
            "scheduler": _own_scheduler(self.model),
        }


_WEAKENED: dict[str, tuple[str | None, ...]] = {
    "pag": (None, "up.0"),
    "seg": (None, "up.0"),
    "slg": (None, "up.0"),
    "tpg": (None, "mid"),
}
_ADM = {"sag": ("mid", "up.0.attentions.0"), **_WEAKENED}
_STYLES = {"sag": ("mid", "down.0"), **_WEAKENED}
TASKS = {
    task.name: task
    for task in (
        Task("adm", "emoji-adm", "emoji-adm", False, False, 0.1, _ADM),
        Task("text", "emoji-styles with captions", "emoji-styles", True, True, 0.0, _STYLES),
        Task("adm-class", "emoji-adm with classes", "emoji-adm", True, False, 0.1, _ADM),
        Task("plain", "emoji-styles without captions", "emoji-styles", False, False, 0.0, _STYLES),
    )
}


@functools.cache
def _order() -> list[int]:
    order = list(range(len(held_out().pictures)))
    random.Random(0).shuffle(order)
    return order


def pairs_of(*, is_search: bool) -> HeldOut:
    """The held-out pairs whose captions the search asks for, or those of the report."""
    return held_out().part(_order()[:_SEARCHED] if is_search else _order()[_SEARCHED:])


def asked_with(seeds: Sequence[int], *, is_search: bool) -> tuple[HeldOut, Tensor]:
    """The pair that is asked for with each seed, and the number of its background."""
    pairs = pairs_of(is_search=is_search)
    count = len(data.BACKGROUNDS)
    backgrounds = torch.tensor([random.Random(seed).randrange(count) for seed in seeds])
    return pairs.part([seed % len(pairs.pictures) for seed in seeds]), backgrounds


@functools.cache
def reference(name: str, *, is_search: bool) -> Tensor:
    """Features of what a task's samples are compared with, (pictures, features) float32.

    The training pictures of `emoji-adm`, or held-out pictures of `emoji-styles`: those that were
    asked for, or all where no caption is given.
    """
    task = TASKS[name]
    if task.model == "emoji-adm":
        with np.load(_REFERENCES / "emoji-adm.npz") as archive:
            return torch.from_numpy(archive["features"])
    pairs = pairs_of(is_search=is_search) if task.conditional else held_out()
    generator = torch.Generator().manual_seed(0)
    parts: list[Tensor] = []
    for _ in range(_BACKGROUNDS_EACH):
        numbers = torch.randint(len(data.BACKGROUNDS), (len(pairs.pictures),), generator=generator)
        parts += [encoder().encode(part).features for part in pairs.shown(numbers).split(100)]
    return torch.cat(parts).float()


@functools.cache
def encoder() -> Any:
    """The package's own small encoder."""
    return load_encoder("emoji")


@functools.cache
def _digest_of_weights(model: str) -> str:
    """Tells the weights of a model's network from earlier ones."""
    (weights,) = (builtin_folder(model) / "unet").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


@functools.cache
def _own_scheduler(model: str) -> dict[str, Any]:
    """Tells the scheduler of a model from earlier ones."""
    path: Path = builtin_folder(model) / "scheduler" / "scheduler_config.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if value is not None}
