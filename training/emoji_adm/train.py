"""Train the builtin model `emoji-adm`, from the raw data to the shipped folder, in one command.

    python training/emoji_adm/train.py --work DIR

The pictures are fetched once, and the training resumes from its checkpoint, so an interrupted run
goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import learning
import shipping
from classes import labels_of, load_small
from shared import data

SEED = 0


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    work: Path = options.work
    data.fetch(work / "data")
    broad = [picture for picture in data.pictures(work / "data") if picture.in_broad]
    print(f"{len(broad)} pictures", flush=True)
    unet = learning.train(
        load_small(broad), labels_of(broad), work / "unet.pt", options.minutes, seed=SEED
    )
    shipping.export(unet, options.out)
    print(f"written to {options.out}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--minutes", type=float, default=150, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=shipping.SHIPPED, help="default: the shipped model's folder"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
