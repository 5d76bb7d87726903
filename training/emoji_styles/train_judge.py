"""Train the judge, two small classifiers.

    python training/emoji_styles/train_judge.py --work DIR

They learn from the same pictures as the model, distorted or seen through the autoencoder, and are
checked on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import save
from diffusers import AutoencoderKL
from judge import CONTENT_FILE, STYLE_FILE, Content, Judge, Style, accuracy, targets
from torch import Tensor, nn

import data

PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05


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
