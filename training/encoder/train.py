"""Train the encoder of `sag evaluate`, from the raw data to the shipped folder, in one command.

    python training/encoder/train.py --work DIR

The pictures are fetched once, and the training resumes from its checkpoint, so an interrupted run
goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import learning
from self_attention_guidance.evaluate.encoder import (
    CONFIG_FILE,
    ENCODER_FOLDER,
    WEIGHTS_FILE,
    EmojiEncoder,
)
from siblings import classes, data

SEED = 0


def export(encoder: EmojiEncoder, folder: Path) -> None:
    """Save `encoder` in half precision, and its settings, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in encoder.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(encoder.config, indent=2) + "\n", "utf-8")


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    work: Path = options.work
    data.fetch(work / "data")
    pictures = [picture for picture in data.pictures(work / "data") if picture.in_broad]
    pixels, labels = data.load_pixels(pictures), classes.labels_of(pictures)
    print(f"{len(pictures)} pictures", flush=True)
    encoder = learning.train(pixels, labels, work / "encoder.pt", options.steps, seed=SEED)
    export(encoder, options.out)
    print(json.dumps(learning.measure(encoder, pixels, labels)))
    print(f"written to {options.out}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=ENCODER_FOLDER, help="default: the shipped encoder's folder"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
