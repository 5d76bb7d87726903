"""What the encoder learns: which picture it sees, of which class, and how it was spoilt.

The third task keeps the features sensitive to blur and noise; knowing pictures alone would teach
the network to overlook them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_attention_guidance.evaluate.encoder import EmojiEncoder
from siblings import classes

SIZE = 64
WIDTHS = (32, 64, 96, 128, 64)
BATCH_SIZE = 48
LEARNING_RATE = 3e-3
CHECKPOINT_EVERY = 250  # steps
MOST_BLUR = 2.0  # pixels
MOST_NOISE = 0.3  # pictures range from -1 to 1
SHIFT = 4  # pixels


class Learner(nn.Module):
    """The encoder, and two heads that only the training needs."""

    def __init__(self, pictures: int) -> None:
        """A network with random weights that tells `pictures` pictures apart."""
        super().__init__()
        self.encoder = EmojiEncoder(size=SIZE, widths=WIDTHS, classes=len(classes.CLASSES))
        # Quarters of the picture: an average over all of it does not tell where things are.
        self.which = nn.Linear(4 * WIDTHS[-1], pictures)
        self.spoilt = nn.Linear(WIDTHS[-1], 2)

    def loss(self, pictures: Tensor, rows: Tensor, labels: Tensor, spoilt: Tensor) -> Tensor:
        """Of (batch, 3, 64, 64) pictures in [-1, 1] and (batch, 2) shares of blur and noise."""
        last = self.encoder.feature_maps(pictures)[-1]
        features = last.mean((2, 3))
        which = self.which(F.adaptive_avg_pool2d(last, 2).flatten(1))
        named = F.cross_entropy(self.encoder.head(features), labels)
        return F.cross_entropy(which, rows) + named + 4 * F.mse_loss(self.spoilt(features), spoilt)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures after a Gaussian blur of `sigma` pixels."""
    if sigma < 0.1:
        return pictures
    reach = int(3 * sigma) + 1
    taps = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps, groups=3), taps.mT, groups=3)


def spoil(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts a batch, mirrors it, halves its resolution, blurs it and adds noise, at random.

    Args:
        pixels: (batch, 3, 64, 64) uint8.

    Returns:
        Pictures (batch, 3, 64, 64) in about [-1, 1]; (batch, 2): blur and noise, from 0 to 1.
    """
    batch = F.pad(pixels.float() / 127.5 - 1, (SHIFT,) * 4, value=1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    batch = batch[:, :, down : down + SIZE, right : right + SIZE]
    if torch.rand(()) < 0.5:
        batch = batch.flip(-1)
    if torch.rand(()) < 0.5:  # the pictures of emoji-adm have half the resolution
        batch = F.interpolate(F.avg_pool2d(batch, 2), scale_factor=2, mode="bilinear")
    # Half of the batches stay sharp; others take three strengths of blur.
    strengths = torch.rand(3) * (torch.rand(()) < 0.5)
    parts = zip(batch.chunk(3), strengths.tolist(), strict=True)
    batch = torch.cat([blurred(part, MOST_BLUR * share) for part, share in parts])
    blur = strengths.repeat_interleave(len(batch) // 3)
    noise = torch.rand(len(batch)) * (torch.rand(len(batch)) < 0.5)
    batch = batch + MOST_NOISE * noise[:, None, None, None] * torch.randn_like(batch)
    return batch, torch.stack([blur, noise], 1)


def train(pixels: Tensor, labels: Tensor, file: Path, steps: int, seed: int) -> EmojiEncoder:
    """Learn from (pictures, 3, 64, 64) uint8 and their classes; resumes from `file`."""
    torch.manual_seed(seed)
    learner = Learner(len(pixels))
    optimizer = torch.optim.AdamW(learner.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    parts: dict[str, Any] = {"learner": learner, "optimizer": optimizer, "schedule": schedule}
    done = _resume(parts, file)
    for step in range(done, steps):
        rows = torch.randint(len(pixels), (BATCH_SIZE,))
        pictures, spoilt = spoil(pixels[rows])
        loss = learner.loss(pictures, rows, labels[rows], spoilt)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            _save(parts, step + 1, file)
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)
    return learner.encoder.eval()


def _save(parts: dict[str, Any], step: int, file: Path) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = file.with_suffix(".partial")
    torch.save(state | {"step": step, "random": torch.get_rng_state()}, partial)
    partial.replace(file)


def _resume(parts: dict[str, Any], file: Path) -> int:
    """Loads a checkpoint, if there is one, and returns the steps that it has seen."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    return state["step"]


@torch.no_grad()
def measure(encoder: EmojiEncoder, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the pictures whose class the head names: as they are, and spoilt at random."""
    torch.manual_seed(1)
    clean = pixels.float() / 127.5 - 1
    count = len(pixels) // 3 * 3
    named = {"clean": encoder(clean).logits, "spoilt": encoder(spoil(pixels[:count])[0]).logits}
    return {
        name: float((logits.argmax(1) == labels[: len(logits)]).double().mean())
        for name, logits in named.items()
    }
