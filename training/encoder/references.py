"""Encode the pictures that the builtin models learned from, as references of benchmarks/quality.

    python training/encoder/references.py --work DIR

The pictures are fetched once. Needs `npm`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from self_attention_guidance.evaluate import (
    FeatureSet,
    LoadedSet,
    load_encoder,
    write_statistics,
)
from self_attention_guidance.evaluate.statistics import moments_of
from siblings import classes, data

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality" / "references"
BATCH_SIZE = 64


def pictures_of(model: str, folder: Path) -> Tensor:
    """What a builtin model learned from, (pictures, 3, height, width) uint8."""
    broad = [picture for picture in data.pictures(folder) if picture.in_broad]
    if model == "emoji":
        return data.load_pixels([picture for picture in broad if picture.in_vocabulary])
    small = classes.load_small(broad)
    return torch.cat([small, small.flip(-1)])  # it learned every picture mirrored, too


def encode(pictures: Tensor) -> FeatureSet:
    """Features of pictures, in their order."""
    encoder = load_encoder("emoji")
    features = torch.cat([encoder.encode(part).features for part in pictures.split(BATCH_SIZE)])
    return FeatureSet(encoder.name, (pictures.shape[-1], pictures.shape[-2]), features.float())


def main() -> None:
    """Fetch, encode and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args()
    data.fetch(options.work / "data")
    options.out.mkdir(parents=True, exist_ok=True)
    for model in ("emoji", "emoji-adm"):
        path = options.out / f"{model}.npz"
        found = encode(pictures_of(model, options.work / "data"))
        write_statistics(path, LoadedSet(path, moments_of(found.features), None, found))
        print(f"{path}: {len(found.features)} pictures")


if __name__ == "__main__":
    main()
