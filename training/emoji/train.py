"""Train the builtin model `emoji`, from the raw data to the shipped folder, in one command.

    python training/emoji/train.py --work DIR

Each stage is skipped when its output is in DIR already, and the two trainings resume from
their checkpoints, so an interrupted run goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

import autoencoder
import captions
import data
import denoiser
import evaluate
import export

SEED = 0


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    work: Path = options.work
    data.fetch(work / "data")
    everything = data.pictures(work / "data")
    broad = [picture for picture in everything if picture.in_broad]
    print(f"{len(everything)} pictures, {len(broad)} of the kinds to learn", flush=True)
    autoencoder_model = autoencoder_stage(work, everything, broad, options.minutes_vae)
    latents = latents_stage(work, autoencoder_model, broad)
    tokenizer = tokenizer_stage(work, everything)
    denoiser_stages(work, latents, broad, tokenizer, options)
    vocabulary = [picture for picture in broad if picture.in_vocabulary]
    model = export.load_average(work / "unet.pt", tokenizer)
    export.export(export.assemble(model, autoencoder_model, tokenizer), vocabulary, options.out)
    report = json.dumps(evaluate.evaluate(options.out, work, seeds=(1, 2, 3)), indent=2)
    (work / "evaluation.json").write_text(report + "\n", encoding="utf-8")
    print(report)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--minutes-vae", type=float, default=11, help="default: %(default)s")
    parser.add_argument("--minutes-broad", type=float, default=27, help="default: %(default)s")
    parser.add_argument("--minutes-unet", type=float, default=35, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=evaluate.SHIPPED, help="default: the shipped model's folder"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


def autoencoder_stage(
    work: Path, everything: list[data.Picture], broad: list[data.Picture], minutes: float
) -> AutoencoderKL:
    """Train on every picture; normalize the latents of the pictures to learn."""
    folder = work / "vae"
    if not folder.exists():
        model = autoencoder.train(data.load_pixels(everything), work / "vae.pt", minutes, seed=SEED)
        autoencoder.normalize_latents(model, data.load_pixels(broad))
        model.save_pretrained(work / "vae.partial")
        (work / "vae.partial").rename(folder)
    return AutoencoderKL.from_pretrained(folder).eval()


def tokenizer_stage(work: Path, everything: list[data.Picture]) -> CLIPTokenizer:
    """Learn the tokenizer once: the library breaks ties at random, so a second one differs."""
    folder = work / "tokenizer"
    if not folder.exists():
        captions.train_tokenizer(everything).save_pretrained(work / "tokenizer.partial")
        (work / "tokenizer.partial").rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


def latents_stage(work: Path, model: AutoencoderKL, broad: list[data.Picture]) -> Tensor:
    """Encode the pictures once; training the U-Net never touches pixels."""
    file = work / "latents.pt"
    if not file.exists():
        torch.save(autoencoder.encode(model, data.load_pixels(broad)), file)
    return torch.load(file, weights_only=True)


def denoiser_stages(
    work: Path,
    latents: Tensor,
    broad: list[data.Picture],
    tokenizer: CLIPTokenizer,
    options: argparse.Namespace,
) -> None:
    """Train on the broad set, then on the vocabulary alone."""
    first, last = work / "unet-broad.pt", work / "unet.pt"
    denoiser.train(
        latents, broad, tokenizer, first, options.minutes_broad, denoiser.BROAD, seed=SEED
    )
    rows = [row for row, picture in enumerate(broad) if picture.in_vocabulary]
    denoiser.train(
        latents[:, rows],
        [broad[row] for row in rows],
        tokenizer,
        last,
        options.minutes_unet,
        denoiser.FINAL,
        start=first,
        seed=SEED + 1,
    )


if __name__ == "__main__":
    main()
