"""Train the model of emoji in seven styles, from the raw data to an exported folder.

    python training/emoji_styles/train.py --work DIR --minutes 120

Each stage is skipped when its output is in DIR already. The last stage, the training of the U-Net
and the text encoder, goes on from its checkpoint each time the command is given, for as many
minutes as it is given, and then exports the model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import networks
import sources
import torch
from checkpoints import save
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

import autoencoder
import captions
import data
import denoiser
import export


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if options.start:
        start_from(options.start, work)
    everything = data_stage(work)
    seen = everything.select(held_out=False)
    print(f"{len(everything.pictures)} pictures, {len(seen.pictures)} to learn from", flush=True)
    model = autoencoder_stage(work, seen, options)
    tokenizer = tokenizer_stage(work, everything)
    learned, held_out = latents_stage(work, model, everything, options)
    trainer = denoiser.Trainer(
        tokenizer, work / "unet.pt", denoiser_options(options), options.start
    )
    trainer.train(
        of_groups(learned, options.groups),
        of_groups(held_out, options.groups),
        captions.CaptionWriter(seen.pictures),
        work / "log.jsonl",
    )
    export.export(work, options.out or work / "model")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the model (default: DIR/model)")
    parser.add_argument(
        "--minutes", type=float, default=120, help="of this run's U-Net (default: %(default)s)"
    )
    parser.add_argument(
        "--anneal",
        type=float,
        default=0,
        metavar="MINUTES",
        help="let the learning rate fall to zero over the last minutes of this run",
    )
    parser.add_argument(
        "--minutes-vae", type=float, default=30, help="of the autoencoder (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size-vae", type=int, default=8, help="of the autoencoder (default: %(default)s)"
    )
    parser.add_argument(
        "--groups", nargs="+", help="learn these groups of CLDR only, such as animals-nature"
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FOLDER",
        help="start from an exported model where DIR has no checkpoint yet",
    )
    parser.add_argument(
        "--channels",
        type=int,
        nargs=2,
        default=networks.CHANNELS,
        help="of a new U-Net, at 16x16 and at 8x8 (default: %(default)s)",
    )
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="in the U-Net (default: %(default)s)"
    )
    parser.add_argument(
        "--largest-weight",
        type=float,
        default=denoiser.LARGEST_WEIGHT,
        help="of errors where noise is weak; larger ones teach details (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="default: %(default)s")
    parser.add_argument(
        "--snapshots",
        type=float,
        metavar="MINUTES",
        help="keep the averaged weights every so many minutes, too, in DIR/snapshots",
    )
    parser.add_argument("--compile", action="store_true", help="compile the networks (GPU)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
    return parser.parse_args()


def denoiser_options(options: argparse.Namespace) -> denoiser.Options:
    """The part of the command line that the last stage reads."""
    return denoiser.Options(
        device=options.device,
        minutes=options.minutes,
        channels=options.channels,
        dropout=options.dropout,
        largest_weight=options.largest_weight,
        anneal_minutes=options.anneal,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        compile=options.compile,
        snapshot_minutes=options.snapshots,
    )


def start_from(folder: Path, work: Path) -> None:
    """Take the autoencoder and the tokenizer of an exported model, which its weights fit."""
    for name in ("vae", "tokenizer"):
        if not (work / name).exists():
            shutil.copytree(folder / name, work / name)


def data_stage(work: Path) -> data.Dataset:
    """Fetch and render. A machine without network needs `pictures.npz` alone."""
    file = work / "pictures.npz"
    if not file.exists():
        sources.fetch(work / "data")
        data.render(work / "data", file, work / "renderer")
    return data.load(file)


def autoencoder_stage(work: Path, seen: data.Dataset, options: argparse.Namespace) -> AutoencoderKL:
    """Train on every picture that is not held out, on random backgrounds."""
    folder = work / "vae"
    if not folder.exists():
        model = autoencoder.train(
            seen.pixels,
            work / "vae.pt",
            options.minutes_vae,
            options.batch_size_vae,
            options.device,
        )
        torch.manual_seed(data.SEED)
        sample = autoencoder.draw_batch(seen.pixels.to(options.device), 4000)
        autoencoder.normalize_latents(model, sample)
        print(f"autoencoder: {autoencoder.decibels(model, sample):.1f} dB", flush=True)
        model.save_pretrained(work / "vae.partial")
        (work / "vae.partial").rename(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def tokenizer_stage(work: Path, everything: data.Dataset) -> CLIPTokenizer:
    """Learn the tokenizer once: the library breaks ties at random, so a second one differs."""
    folder = work / "tokenizer"
    if not folder.exists():
        captions.train_tokenizer(everything.pictures).save_pretrained(work / "tokenizer.partial")
        (work / "tokenizer.partial").rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


def latents_stage(
    work: Path, model: AutoencoderKL, everything: data.Dataset, options: argparse.Namespace
) -> tuple[denoiser.Examples, denoiser.Examples]:
    """Encode the pictures once; training the U-Net never touches pixels."""
    file = work / "latents.pt"
    parts = [everything.select(held_out=held_out) for held_out in (False, True)]
    if not file.exists():
        model.to(options.device)
        encoded = [autoencoder.encode(model, part.pixels.to(options.device)) for part in parts]
        save({"learned": encoded[0], "held_out": encoded[1]}, file)
    state = torch.load(file, weights_only=True)
    return (
        denoiser.Examples(parts[0].pictures, state["learned"]),
        denoiser.Examples(parts[1].pictures, state["held_out"]),
    )


def of_groups(examples: denoiser.Examples, groups: list[str] | None) -> denoiser.Examples:
    """The examples of some groups of things, or all."""
    if groups is None:
        return examples
    rows = [row for row, picture in enumerate(examples.pictures) if picture.group in groups]
    return denoiser.Examples([examples.pictures[row] for row in rows], examples.latents[rows])


if __name__ == "__main__":
    main()
