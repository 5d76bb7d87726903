"""The held-out pictures of `emoji-styles` and the judge of its samples, from its training."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "emoji_styles"))

import judge

import data

FOLDER = Path(__file__).parent / "held_out"
PICTURES = FOLDER / "pictures.npz"
JUDGE = FOLDER / "judge.safetensors"
# What is right of a sample, in the order in which `Critic.right` has it.
QUESTIONS = ("thing", "thing_top5", "style", "background")


@dataclass(frozen=True)
class HeldOut:
    """Pairs of a thing and a style that training never showed, though it showed the thing.

    Attributes:
        pictures: What they show.
        rgba: Their pixels with alpha, (pictures, 64, 64, 4) uint8.
    """

    pictures: list[data.Picture]
    rgba: Tensor

    def part(self, rows: list[int]) -> HeldOut:
        """Some of them."""
        return HeldOut([self.pictures[row] for row in rows], self.rgba[rows])

    def shown(self, backgrounds: Tensor) -> Tensor:
        """All of them on backgrounds by their numbers, (pictures, 3, 64, 64) uint8."""
        pictures = data.on_background(self.rgba, data.palette()[backgrounds])
        return ((pictures + 1) * 127.5).round().byte()

    def captions(self, backgrounds: Tensor) -> list[str]:
        """What asks for each of them on a background."""
        names = list(data.BACKGROUNDS)
        pairs = zip(self.pictures, backgrounds.tolist(), strict=True)
        return [picture.caption(names[number]) for picture, number in pairs]


@functools.cache
def held_out() -> HeldOut:
    """All held-out pairs."""
    with np.load(PICTURES) as archive:
        index, rgba = json.loads(archive["index"].item()), archive["rgba"]
    pictures = [data.Picture(*pair, keywords=(), group="", held_out=True) for pair in index]
    return HeldOut(pictures, torch.from_numpy(rgba))


class Critic:
    """Says whether thing, style and background of samples are those that were asked for."""

    def __init__(self) -> None:
        """Load the judge."""
        with safe_open(JUDGE, framework="pt") as file:
            self.things: list[str] = json.loads(file.metadata()["things"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        self.judge = judge.Judge(len(self.things))
        self.judge.load_state_dict(state)
        self.judge.eval()

    @torch.no_grad()
    def right(self, pixels: Tensor, pictures: list[data.Picture], backgrounds: Tensor) -> Tensor:
        """Whether each of `QUESTIONS` is answered rightly.

        Args:
            pixels: Samples, (samples, 3, 64, 64) uint8.
            pictures: What was asked for.
            backgrounds: Numbers of the backgrounds that were asked for.

        Returns:
            (samples, questions) bool.
        """
        answers = judge.targets(pictures, self.things)
        thing, style, background = self.judge(pixels.float() / 127.5 - 1)
        order = thing.topk(5).indices == answers.things[:, None]
        columns = [
            order[:, 0],
            order.any(1),
            style.argmax(1) == answers.styles,
            background.argmax(1) == backgrounds,
        ]
        return torch.stack(columns, dim=1)


@functools.cache
def critic() -> Critic:
    """The judge, loaded once."""
    return Critic()
