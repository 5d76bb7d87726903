"""Train the builtin model `emoji`, from the raw data to the shipped folder, in one command.

    python training/emoji/train.py --work DIR

Each stage is skipped when its output is in DIR already, and the two trainings resume from
their checkpoints, so an interrupted run goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import autoencoder
import captions
import data
import denoiser
import torch
from diffusers import AutoencoderKL
from torch import Tensor

SEED = 0


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    work: Path = options.work
    data.fetch(work / "data")
    everything = data.pictures(work / "data")
    vocabulary = [picture for picture in everything if picture.in_vocabulary]
    print(f"{len(everything)} pictures, {len(vocabulary)} of them in the vocabulary", flush=True)
    autoencoder_model = autoencoder_stage(work, everything, vocabulary, options.minutes_vae)
    latents = latents_stage(work, autoencoder_model, vocabulary)
    tokenizer = captions.train_tokenizer(everything)
    denoiser.train(
        latents, vocabulary, tokenizer, work / "unet.pt", options.minutes_unet, seed=SEED
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--minutes-vae", type=float, default=11, help="default: %(default)s")
    parser.add_argument("--minutes-unet", type=float, default=66, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


def autoencoder_stage(
    work: Path, everything: list[data.Picture], vocabulary: list[data.Picture], minutes: float
) -> AutoencoderKL:
    """Train on every picture; normalize the latents of the vocabulary."""
    folder = work / "vae"
    if not folder.exists():
        model = autoencoder.train(
            data.load_pixels(everything), work / "vae.pt", minutes, seed=SEED
        )
        autoencoder.normalize_latents(model, data.load_pixels(vocabulary))
        model.save_pretrained(work / "vae.partial")
        (work / "vae.partial").rename(folder)
    return AutoencoderKL.from_pretrained(folder).eval()


def latents_stage(work: Path, model: AutoencoderKL, vocabulary: list[data.Picture]) -> Tensor:
    """Encode the vocabulary once; training the U-Net never touches pixels."""
    file = work / "latents.pt"
    if not file.exists():
        torch.save(autoencoder.encode(model, data.load_pixels(vocabulary)), file)
    return torch.load(file, weights_only=True)


if __name__ == "__main__":
    main()
