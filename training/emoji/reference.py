"""Write the compact reference pictures that the tests of the shipped model compare with.

python training/emoji/reference.py --work DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

import data

REFERENCE = Path(__file__).parents[2] / "tests/data/emoji_reference.npz"


def thumbnails(pixels: Tensor) -> Tensor:
    """Pictures averaged down from 64x64 to 16x16, (pictures, 16, 16, 3) uint8."""
    return avg_pool2d(pixels.float(), 4).round().byte().permute(0, 2, 3, 1)


def main() -> None:
    """Write captions and thumbnails of the whole vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    options = parser.parse_args()
    pictures = [p for p in data.pictures(options.work / "data") if p.in_vocabulary]
    small = thumbnails(data.load_pixels(pictures)).numpy()
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(REFERENCE, captions=[p.caption for p in pictures], thumbnails=small)


if __name__ == "__main__":
    main()
