"""The pictures as training sees them: rendered once, on eleven backgrounds, some held out."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import venv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sources
import torch
from torch import Tensor

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (229, 57, 53),
    "orange": (251, 140, 0),
    "yellow": (253, 216, 53),
    "green": (67, 160, 71),
    "blue": (30, 136, 229),
    "purple": (142, 36, 170),
    "pink": (244, 143, 177),
    "brown": (121, 85, 72),
    "gray": (158, 158, 158),
    "black": (33, 33, 33),
}
STYLES = tuple(sources.STYLES.values())
HELD_OUT_FILE = Path(__file__).parent / "held_out.txt"
HELD_OUT_SHARE = 0.10
HELD_OUT_THINGS = 40
SEED = 0
RENDERER = ("cairosvg==2.9.1", "numpy==2.4.6", "pillow==13.0.0")


@dataclass(frozen=True)
class Picture:
    """One thing in one style, and whether training may see it."""

    label: str
    style: str
    keywords: tuple[str, ...]
    group: str
    held_out: bool

    def caption(self, background: str) -> str:
        """The one caption that names this picture on this background and no other."""
        return caption(self.label, self.style, background)


@dataclass(frozen=True)
class Dataset:
    """Pictures, and their pixels with alpha, (pictures, 64, 64, 4) uint8."""

    pictures: list[Picture]
    pixels: Tensor

    def select(self, *, held_out: bool) -> Dataset:
        """The part held out, or the rest."""
        return self._where([picture.held_out == held_out for picture in self.pictures])

    def held_out_pairs(self) -> Dataset:
        """What is held out of the things that the rest shows in other styles."""
        shown = {picture.label for picture in self.pictures if not picture.held_out}
        return self._where(
            [picture.held_out and picture.label in shown for picture in self.pictures]
        )

    def of_groups(self, groups: Collection[str] | None) -> Dataset:
        """The things of some groups of CLDR, or all."""
        return self._where([groups is None or picture.group in groups for picture in self.pictures])

    def _where(self, wanted: Sequence[bool]) -> Dataset:
        rows = [row for row, keep in enumerate(wanted) if keep]
        return Dataset([self.pictures[row] for row in rows], self.pixels[rows])

    @property
    def labels(self) -> list[str]:
        """The things that the pictures show, each once, in a fixed order."""
        return list(dict.fromkeys(picture.label for picture in self.pictures))


def caption(label: str, style: str, background: str) -> str:
    """A whole caption: thing, style and background."""
    return f"{label}, {style}, on {background}"


def render(folder: Path, out: Path, environment: Path) -> None:
    """Render all pictures into `out`, in an environment that has CairoSVG."""
    if out.exists():
        return
    python = environment / "bin/python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *RENDERER], check=True)
    script = Path(__file__).parent / "render.py"
    subprocess.run([python, script, folder, out], check=True)


def load(file: Path) -> Dataset:
    """Every rendered picture, with what is held out marked."""
    with np.load(file) as archive:
        index, pixels = json.loads(archive["index"].item()), archive["rgba"]
    things, pairs = read_held_out()
    pictures = [
        Picture(
            label=thing["label"],
            style=style,
            keywords=tuple(thing["keywords"]),
            group=thing["group"],
            held_out=thing["label"] in things or (thing["label"], style) in pairs,
        )
        for thing in index
        for style in thing["styles"]
    ]
    assert len(pictures) == len(pixels)
    return Dataset(pictures, torch.from_numpy(pixels))


def on_background(pixels: Tensor, colours: Tensor) -> Tensor:
    """Pictures over plain colours.

    Args:
        pixels: Pictures with alpha, (pictures, 64, 64, 4) uint8.
        colours: One for each picture, (pictures, 3), from 0 to 255.

    Returns:
        (pictures, 3, 64, 64) float32, from -1 to 1.
    """
    drawing, alpha = pixels[..., :3].float(), pixels[..., 3:].float() / 255
    blended = drawing * alpha + colours[:, None, None, :] * (1 - alpha)
    return blended.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def palette() -> Tensor:
    """The background colours in the order of `BACKGROUNDS`, (11, 3) float32."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)


def choose_held_out(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """Which things, and which (thing, style) pairs of other things, training never sees.

    A thing loses two styles at most, so that training sees it in three at least.
    """
    rng = random.Random(SEED)
    things = sorted(rng.sample(sorted({label for label, _ in pairs}), k=HELD_OUT_THINGS))
    rest = sorted(pair for pair in pairs if pair[0] not in things)
    count = round(HELD_OUT_SHARE * len(rest))
    rng.shuffle(rest)
    lost: dict[str, int] = {}
    held: list[tuple[str, str]] = []
    for label, style in rest:
        if len(held) < count and lost.get(label, 0) < 2:
            held.append((label, style))
            lost[label] = lost.get(label, 0) + 1
    return things, sorted(held)


def write_held_out(pairs: Sequence[tuple[str, str]]) -> None:
    """Choose what is held out and write `held_out.txt`: "thing, *" is a whole thing."""
    things, held = choose_held_out(pairs)
    lines = [*(f"{label}, *" for label in things), *(f"{label}, {style}" for label, style in held)]
    HELD_OUT_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_held_out() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """The held-out things, and the held-out (thing, style) pairs of other things."""
    lines = HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()
    parts = [tuple(line.rsplit(", ", 1)) for line in lines]
    things = frozenset(label for label, style in parts if style == "*")
    return things, frozenset((label, style) for label, style in parts if style != "*")


def main() -> None:
    """Write `held_out.txt` anew from a file of rendered pictures."""
    with np.load(sys.argv[1]) as archive:
        index = json.loads(archive["index"].item())
    write_held_out([(thing["label"], style) for thing in index for style in thing["styles"]])


if __name__ == "__main__":
    main()
