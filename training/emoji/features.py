"""A small classifier of the vocabulary, whose features compare sets of pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
STEPS = 1500
BATCH_SIZE = 64


class Classifier(nn.Module):
    """Four strided convolutions, 64 pooled features, one logit per picture."""

    def __init__(self, classes: int) -> None:
        """A new network with random weights that tells `classes` pictures apart."""
        super().__init__()
        widths = (3, 32, 64, 96, FEATURES)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES * 4, classes)

    def features(self, pictures: Tensor) -> Tensor:
        """Mean of each feature over the picture: (batch, 64) from (batch, 3, 64, 64) in [-1, 1]."""
        return self.body(pictures).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits, (batch, classes), from features averaged over the picture's quarters."""
        return self.head(F.adaptive_avg_pool2d(self.body(pictures), 2).flatten(1))


def train_classifier(pixels: Tensor, file: Path, seed: int = 0) -> Classifier:
    """Learn to name each of the (pictures, 3, 64, 64) uint8 pictures, shifted and noisy."""
    model = Classifier(len(pixels))
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    torch.manual_seed(seed)
    model = Classifier(len(pixels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.randint(len(pixels), (BATCH_SIZE,))
        loss = F.cross_entropy(model(augmented(pixels[rows])), rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"classifier step {step + 1} loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def augmented(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1], shifted by up to four pixels, mirrored at random, with noise."""
    padded = F.pad(pixels.float() / 127.5 - 1, (4, 4, 4, 4), value=1.0)
    down, right = torch.randint(9, (2,)).tolist()
    batch = padded[:, :, down : down + 64, right : right + 64]
    if torch.rand(()) < 0.5:
        batch = batch.flip(-1)
    return batch + 0.1 * torch.randn_like(batch)


@torch.no_grad()
def extract(model: Classifier, pictures: Tensor) -> Tensor:
    """Features of (pictures, 3, 64, 64) uint8, float64."""
    chunks = pictures.split(128)
    return torch.cat([model.features(chunk.float() / 127.5 - 1) for chunk in chunks]).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features, (count, features), as Gaussians.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), Heusel et al., arXiv 1706.08500, eq. 6.
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The eigenvalues of A B are real and not negative, so the trace of its root is their sum.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * root)
