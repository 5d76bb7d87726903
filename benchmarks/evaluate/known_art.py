"""Write what the small encoder of `sag evaluate` was made for: where the art's features lie.

    python benchmarks/evaluate/known_art.py

It takes the features that benchmarks/quality keeps of the pictures that the builtin models learned
from, and writes their mean, what makes their covariance the identity, and the largest distance from
the mean that any of them has then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from self_attention_guidance.evaluate.encoder import ENCODER_FOLDER, KNOWN_FILE

REFERENCES = Path(__file__).parents[1] / "quality" / "references"


def known_art(folder: Path = REFERENCES) -> dict[str, Tensor]:
    """Mean (features,), whitening (features, features) and radius () of a folder's features."""
    files = sorted(folder.glob("*.npz"))
    features = torch.cat([torch.from_numpy(np.load(file)["features"]) for file in files]).double()
    mean = features.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(features.T.cov())).T
    radius = ((features - mean) @ whitening).norm(dim=1).max()
    known = {"mean": mean, "whitening": whitening, "radius": radius}
    return {name: value.float().contiguous() for name, value in known.items()}


if __name__ == "__main__":
    save_file(known_art(), ENCODER_FOLDER / KNOWN_FILE)
