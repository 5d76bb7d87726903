"""Two small classifiers that say what a picture shows: thing and background, and style.

    python training/emoji_styles/judge.py --work DIR

They learn from the same pictures as the model, distorted or seen through the autoencoder, and are
checked on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import save
from diffusers import AutoencoderKL
from torch import Tensor, nn

import data

CONTENT_FILE = "judge_content.pt"
STYLE_FILE = "judge_style.pt"
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
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


class Lesson:
    """What a classifier learns from: pictures, with the right answers."""

    def __init__(
        self, dataset: data.Dataset, decoded: Tensor, batch_size: int, device: str
    ) -> None:
        """`decoded` is what the autoencoder makes of the pictures, (pictures, 3, 64, 64) uint8."""
        self.pixels, self.decoded = dataset.pixels.to(device), decoded.to(device)
        self.colours = data.palette().to(device)
        answers = targets(dataset.pictures, dataset.labels)
        self.things, self.styles = answers.things.to(device), answers.styles.to(device)
        self.batch_size, self.device = batch_size, device

    def _random(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), device=self.device)

    def content(self, model: Content) -> Tensor:
        """The loss of one batch of distorted pictures."""
        rows = self._random(len(self.pixels), self.batch_size)
        grounds = self._random(len(self.colours), self.batch_size)
        # Backgrounds vary a little too: a model draws them nearly right.
        ground = self.colours[grounds]
        ground = (ground + 6 * torch.randn_like(ground)).clamp(0, 255)
        batch = data.on_background(distorted(self.pixels[rows]), ground)
        thing, background = model(batch)
        return F.cross_entropy(
            thing.float(), self.things[rows], label_smoothing=0.1
        ) + 0.2 * F.cross_entropy(background.float(), grounds)

    def style(self, model: Style) -> Tensor:
        """The loss of one batch, half of it as the autoencoder draws it, softened a little."""
        rows = self._random(len(self.pixels), 2 * self.batch_size)
        plain, drawn = rows[: self.batch_size], rows[self.batch_size :]
        grounds = self._random(len(self.colours), self.batch_size)
        batch = torch.cat(
            [
                data.on_background(self.pixels[plain], self.colours[grounds]),
                self.decoded[drawn].float() / 127.5 - 1,
            ]
        )
        soft = F.avg_pool2d(batch, 3, stride=1, padding=1, count_include_pad=False)
        softness = 0.4 * torch.rand(len(batch), 1, 1, 1, device=self.device)
        tint = 0.02 * torch.randn(len(batch), 3, 1, 1, device=self.device)
        batch = batch + softness * (soft - batch) + tint
        scores = model(batch).float()
        return F.cross_entropy(scores, self.styles[rows], label_smoothing=0.05)


def train(
    model: nn.Module,
    loss_of_batch: Callable[[Any], Tensor],
    checkpoint: Path,
    minutes: float,
    device: str,
) -> None:
    """Train one classifier for `minutes` of wall-clock time; resumes from `checkpoint`."""
    torch.manual_seed(data.SEED)
    model.to(device).train()
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
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of_batch(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % 500 == 0:
            _save(checkpoint, model, optimizer, spent, step)
            print(f"{checkpoint.stem} step {step} {spent:.0f} s {loss.item():.3f}", flush=True)
    _save(checkpoint, model, optimizer, max(spent, budget), step)
    model.cpu().eval()


def _save(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, spent: float, step: int
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save({**state, "spent": spent, "step": step}, checkpoint)


def load(work: Path, things: int) -> Judge:
    """The trained judge on the CPU."""
    judge = Judge(things)
    for model, file in ((judge.content, CONTENT_FILE), (judge.style, STYLE_FILE)):
        state = torch.load(work / file, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
    return judge.eval()


@torch.no_grad()
def decoded_stage(work: Path, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What the autoencoder makes of each picture on one random background, once.

    Returns:
        For the "learned" and the "held_out" part: pictures, (pictures, 3, 64, 64) uint8, and the
        numbers of their backgrounds.
    """
    file = work / "decoded.pt"
    if not file.exists():
        torch.manual_seed(data.SEED)
        vae = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32)
        vae = vae.to(device).eval()
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, latents in torch.load(work / "latents.pt", weights_only=True).items():
            grounds = torch.randint(latents.shape[2], (len(latents),))
            chosen = latents[torch.arange(len(latents)), 0, grounds].to(device, torch.float32)
            with torch.autocast(device, dtype=torch.bfloat16):
                drawn = [vae.decode(batch).sample.float().cpu() for batch in chosen.split(32)]
            pictures = ((torch.cat(drawn).clamp(-1, 1) + 1) * 127.5).round().byte()
            parts[name] = (pictures, grounds)
        save(parts, file)
    return torch.load(file, weights_only=True)


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


def check(
    model: Judge, pairs: data.Dataset, labels: Sequence[str], decoded: Tensor, grounds: Tensor
) -> dict[str, dict[str, float]]:
    """The judge's own accuracy on real pictures on the backgrounds `grounds`.

    What it says of the same pictures out of the autoencoder is the most that a model can reach.
    """
    answers = targets(pairs.pictures, labels)
    real = data.on_background(pairs.pixels, data.palette()[grounds])
    return {
        "real": accuracy(model, real, answers, grounds),
        "autoencoder": accuracy(model, decoded.float() / 127.5 - 1, answers, grounds),
    }


def main() -> None:
    """Train the judge, and print how often it is right about pictures it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument(
        "--minutes", type=float, nargs=2, default=[20, 15], help="of thing and background, of style"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    work, device = options.work, options.device
    everything = data.load(work / "pictures.npz")
    seen, held_out = (everything.select(held_out=part) for part in (False, True))
    decoded = decoded_stage(work, device)
    lesson = Lesson(seen, decoded["learned"][0], options.batch_size, device)
    judge = Judge(len(seen.labels))
    train(judge.content, lesson.content, work / CONTENT_FILE, options.minutes[0], device)
    train(judge.style, lesson.style, work / STYLE_FILE, options.minutes[1], device)
    judge.eval()
    shown = set(seen.labels)
    rows = [row for row, picture in enumerate(held_out.pictures) if picture.label in shown]
    shown_decoded, grounds = (part[rows] for part in decoded["held_out"])
    pairs = everything.held_out_pairs()
    report = check(judge, pairs, seen.labels, shown_decoded, grounds)
    text = json.dumps(report, indent=2)
    (work / "judge.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
