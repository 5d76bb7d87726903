"""Two small classifiers that say what a picture shows: thing and background, and style.

`train_judge.py` trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data

CONTENT_FILE = "judge_content.pt"
STYLE_FILE = "judge_style.pt"
CONTENT_WIDTHS = (64, 128, 256, 320)
STYLE_WIDTHS = (64, 128, 256)
PATCH = 32
COLOUR_BINS = 16
RANGE_BINS = 32


class Block(nn.Module):
    """Two convolutions beside a shortcut; halves the resolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        """`width_in` channels come in, `width_out` go out."""
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
            nn.SiLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width_in, width_out, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, in, n, n) to (batch, out, n / 2, n / 2)."""
        return F.silu(self.path(inputs) + self.shortcut(inputs))


class Content(nn.Module):
    """Tells things and backgrounds apart."""

    def __init__(self, things: int) -> None:
        """Knows `things` things, and all backgrounds."""
        super().__init__()
        self.body = blocks(3, CONTENT_WIDTHS)
        self.drop = nn.Dropout(0.2)
        width = CONTENT_WIDTHS[-1]
        # A thing is recognised by what is where: its head sees 2x2 parts beside the mean.
        self.thing = nn.Linear(5 * width, things)
        self.background = nn.Linear(width, len(data.BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of things and of backgrounds for (batch, 3, 64, 64) from -1 to 1."""
        features = self.body(pictures)
        mean = features.mean((2, 3))
        parts = F.adaptive_avg_pool2d(features, 2).flatten(1)
        return self.thing(self.drop(torch.cat([mean, parts], dim=1))), self.background(mean)


class Style(nn.Module):
    """Tells styles apart, by colours and by small patches.

    A network that sees whole pictures learns the training pictures by heart, and then finds for a
    held-out pair any style but the right one, for it has seen the thing in all the others. So this
    one never sees a thing: a histogram of colours, for each set has its own palette, and patches
    of a quarter of the picture, which show outlines and shading.
    """

    def __init__(self) -> None:
        """Knows all styles."""
        super().__init__()
        self.palette = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(2 * COLOUR_BINS**3 + RANGE_BINS, 128), nn.ReLU()
        )
        self.body = blocks(3, STYLE_WIDTHS)
        self.head = nn.Sequential(
            nn.Dropout(0.4), nn.Linear(128 + 2 * STYLE_WIDTHS[-1], len(data.STYLES))
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of styles for (batch, 3, 64, 64) from -1 to 1.

        In training one random patch of each picture is looked at, else the mean of nine.
        """
        palette = self.palette(histogram(pictures))
        if self.training:
            return self.score(palette, random_patches(pictures))
        last = pictures.shape[-1] - PATCH - 6
        corners = [(y, x) for y in (6, (6 + last) // 2, last) for x in (6, (6 + last) // 2, last)]
        patches = [pictures[:, :, y : y + PATCH, x : x + PATCH] for y, x in corners]
        return torch.stack([self.score(palette, patch) for patch in patches]).mean(0)

    def score(self, palette: Tensor, patches: Tensor) -> Tensor:
        """Scores of styles from the seen colours and one patch of each picture."""
        features = self.body(patches)
        pooled = [features.mean((2, 3)), features.amax((2, 3))]
        return self.head(torch.cat([palette, *pooled], dim=1))


def blocks(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """A block for each width; `channels` come in."""
    pairs = zip((channels, *widths[:-1]), widths, strict=True)
    return nn.Sequential(*(Block(before, after) for before, after in pairs))


@torch.no_grad()
def histogram(pictures: Tensor) -> Tensor:
    """How often each colour occurs: among all pixels of the drawing, and among those in areas of
    one colour; and how often each difference of neighbours. Square roots of shares.

    The outermost pixels show the background; pixels like it are not counted.

    Args:
        pictures: (batch, 3, 64, 64) from -1 to 1.

    Returns:
        (batch, 2 * COLOUR_BINS ** 3 + RANGE_BINS).
    """
    colours = (pictures.float() + 1) * 127.5
    top, bottom, sides = colours[:, :, 0], colours[:, :, -1], colours[:, :, :, [0, -1]].flatten(2)
    background = torch.cat([top, bottom, sides], dim=2).median(dim=2).values
    drawn = (colours - background[:, :, None, None]).abs().amax(1) > 24
    spread = F.max_pool2d(colours, 3, 1, 1) + F.max_pool2d(-colours, 3, 1, 1)
    spread = spread.amax(1)
    cells = (colours.clamp(0, 255) * (COLOUR_BINS / 256)).long()
    cells = (cells[:, 0] * COLOUR_BINS + cells[:, 1]) * COLOUR_BINS + cells[:, 2]
    steps = (spread * (RANGE_BINS / 256)).long().clamp(max=RANGE_BINS - 1)
    counts = [
        (cells, drawn & (spread < 40), COLOUR_BINS**3),
        (cells, drawn, COLOUR_BINS**3),
        (steps, drawn, RANGE_BINS),
    ]
    return torch.cat([_shares(*count) for count in counts], dim=1)


def _shares(cells: Tensor, counted: Tensor, bins: int) -> Tensor:
    found = torch.zeros(len(cells), bins, device=cells.device)
    found.scatter_add_(1, cells.flatten(1), counted.flatten(1).float())
    return (found / found.sum(1, keepdim=True).clamp(min=1)).sqrt()


def random_patches(pictures: Tensor) -> Tensor:
    """One patch of each picture, (batch, 3, 32, 32); the whole batch is flipped or turned alike."""
    count, _, size, _ = pictures.shape
    corners = torch.randint(6, size - PATCH - 5, (count, 2)).tolist()
    patches = torch.stack(
        [
            picture[:, y : y + PATCH, x : x + PATCH]
            for picture, (y, x) in zip(pictures, corners, strict=True)
        ]
    )
    flips = [dim for dim in (2, 3) if torch.rand(()) < 0.5]
    patches = patches.flip(flips)
    return patches.transpose(2, 3) if torch.rand(()) < 0.5 else patches


class Judge(nn.Module):
    """Both classifiers."""

    def __init__(self, things: int) -> None:
        """Tells `things` things apart, and all styles and backgrounds."""
        super().__init__()
        self.content, self.style = Content(things), Style()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of things, styles and backgrounds for (batch, 3, 64, 64) from -1 to 1."""
        thing, background = self.content(pictures)
        return thing, self.style(pictures), background


@dataclass(frozen=True)
class Targets:
    """The right answers, (pictures,) each; -1 is a thing that the judge does not know."""

    things: Tensor
    styles: Tensor


def targets(pictures: Sequence[data.Picture], labels: Sequence[str]) -> Targets:
    """The numbers of things and styles of some pictures."""
    numbers = {label: number for number, label in enumerate(labels)}
    return Targets(
        torch.tensor([numbers.get(picture.label, -1) for picture in pictures]),
        torch.tensor([data.STYLES.index(picture.style) for picture in pictures]),
    )


def load(work: Path, things: int) -> Judge:
    """The trained judge on the CPU."""
    judge = Judge(things)
    for model, file in ((judge.content, CONTENT_FILE), (judge.style, STYLE_FILE)):
        state = torch.load(work / file, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
    return judge.eval()


@torch.no_grad()
def accuracy(
    model: Judge, pictures: Tensor, answers: Targets, backgrounds: Tensor
) -> dict[str, float]:
    """Shares of right answers for (pictures, 3, 64, 64) from -1 to 1, in percent."""
    parts = [model(batch) for batch in pictures.split(64)]
    thing, style, background = (torch.cat(column) for column in zip(*parts, strict=True))
    order = thing.topk(5).indices == answers.things[:, None]
    right = {
        "thing": order[:, 0],
        "thing_top5": order.any(1),
        "style": style.argmax(1) == answers.styles,
        "background": background.argmax(1) == backgrounds,
    }
    return {name: round(100 * hits.float().mean().item(), 1) for name, hits in right.items()}
