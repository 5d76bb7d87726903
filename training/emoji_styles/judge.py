"""A small classifier that says what a picture shows: thing, style and background.

    python training/emoji_styles/judge.py --work DIR

It learns from the same pictures as the model, distorted, and is checked on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import save
from torch import Tensor, nn

import data

BATCH_SIZE = 32
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WIDTHS = (48, 96, 192, 256)


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


class Judge(nn.Module):
    """Four blocks, and a linear head for each question."""

    def __init__(self, things: int) -> None:
        """Tells `things` things apart, and all styles and backgrounds."""
        super().__init__()
        widths = zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.body = nn.Sequential(*(Block(before, after) for before, after in widths))
        self.drop = nn.Dropout(0.2)
        # A thing is recognised by what is where: its head sees 2x2 parts beside the mean.
        self.thing = nn.Linear(5 * WIDTHS[-1], things)
        self.style = nn.Linear(WIDTHS[-1], len(data.STYLES))
        self.background = nn.Linear(WIDTHS[-1], len(data.BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of things, styles and backgrounds for (batch, 3, 64, 64) from -1 to 1."""
        features = self.body(pictures)
        mean = features.mean((2, 3))
        parts = F.adaptive_avg_pool2d(features, 2).flatten(1)
        thing = self.thing(self.drop(torch.cat([mean, parts], dim=1)))
        return thing, self.style(mean), self.background(mean)


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


def distorted(pixels: Tensor) -> Tensor:
    """Each drawing moved, scaled, turned, tinted and softened a little.

    Args:
        pixels: (pictures, 64, 64, 4) uint8.

    Returns:
        The same shape, float32, from 0 to 255.
    """
    count, device = len(pixels), pixels.device

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device)

    # Without colours where nothing is drawn, or they would show at moved edges.
    drawing = pixels.float().permute(0, 3, 1, 2) / 255
    drawing = torch.cat([drawing[:, :3] * drawing[:, 3:], drawing[:, 3:]], dim=1)
    angle, scale = between(-0.12, 0.12), between(0.9, 1.15)
    rows = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() * scale, between(-0.12, 0.12)], dim=1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, between(-0.12, 0.12)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(drawing.shape), align_corners=False)
    moved = F.grid_sample(drawing, grid, align_corners=False)
    soft = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    softness = between(0, 0.7, 1, 1, 1)
    moved = moved * (1 - softness) + soft * softness
    alpha = moved[:, 3:]
    colour = moved[:, :3] / alpha.clamp(min=1 / 255)
    colour = (colour * between(0.9, 1.1, 3, 1, 1) + between(-0.05, 0.05, 1, 1, 1)).clamp(0, 1)
    return 255 * torch.cat([colour, alpha], dim=1).permute(0, 2, 3, 1)


def train(dataset: data.Dataset, checkpoint: Path, minutes: float, device: str) -> Judge:
    """Train for `minutes` of wall-clock time; resumes from `checkpoint`."""
    torch.manual_seed(data.SEED)
    model = Judge(len(dataset.labels)).to(device)
    pixels, colours = dataset.pixels.to(device), data.palette().to(device)
    answers = targets(dataset.pictures, dataset.labels)
    things, styles = answers.things.to(device), answers.styles.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    spent, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
        torch.manual_seed(data.SEED + step)
    began, budget = time.monotonic() - spent, minutes * 60
    while (spent := time.monotonic() - began) < budget:
        fall = 0.5 * (1 + math.cos(math.pi * spent / budget))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(1.0, (step + 1) / 200) * fall
        rows = torch.randint(len(pixels), (BATCH_SIZE,), device=device)
        grounds = torch.randint(len(colours), (BATCH_SIZE,), device=device)
        # Backgrounds vary a little too: a model draws them nearly right.
        ground = (colours[grounds] + 6 * torch.randn(BATCH_SIZE, 3, device=device)).clamp(0, 255)
        batch = data.on_background(distorted(pixels[rows]), ground)
        with torch.autocast(device, dtype=torch.bfloat16):
            thing, style, background = model(batch)
        loss = (
            F.cross_entropy(thing.float(), things[rows], label_smoothing=0.1)
            + 0.5 * F.cross_entropy(style.float(), styles[rows])
            + 0.2 * F.cross_entropy(background.float(), grounds)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % 500 == 0:
            _save(checkpoint, model, optimizer, spent, step)
            print(f"judge step {step} {spent:.0f} s loss {loss.item():.3f}", flush=True)
    _save(checkpoint, model, optimizer, budget, step)
    return model.eval()


def _save(
    checkpoint: Path, model: Judge, optimizer: torch.optim.Optimizer, spent: float, step: int
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save({**state, "spent": spent, "step": step}, checkpoint)


def load(checkpoint: Path, things: int) -> Judge:
    """A trained judge on the CPU."""
    model = Judge(things)
    model.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["model"])
    return model.eval()


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


def check(model: Judge, dataset: data.Dataset, labels: Sequence[str]) -> dict[str, float]:
    """The judge's own accuracy on real pictures, each on a random background."""
    generator = torch.Generator().manual_seed(data.SEED)
    backgrounds = torch.randint(
        len(data.BACKGROUNDS), (len(dataset.pictures),), generator=generator
    )
    shown = data.on_background(dataset.pixels, data.palette()[backgrounds])
    return accuracy(model, shown, targets(dataset.pictures, labels), backgrounds)


def main() -> None:
    """Train the judge, and print how often it is right about pictures it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    everything = data.load(options.work / "pictures.npz")
    seen = everything.select(held_out=False)
    model = train(seen, options.work / "judge.pt", options.minutes, options.device).cpu()
    pairs = everything.held_out_pairs()
    report = {"held_out": check(model, pairs, seen.labels)}
    for group in dict.fromkeys(picture.group for picture in pairs.pictures):
        report[group] = check(model, pairs.of_groups([group]), seen.labels)
    text = json.dumps(report, indent=2)
    (options.work / "judge.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
