"""Measure settings of Self-Attention Guidance on the shipped model, and store the chosen ones.

    python training/emoji_adm/sag_settings.py --work DIR [--count 512] [--candidates 0 1]
    python training/emoji_adm/sag_settings.py --sheet FILE.png
    python training/emoji_adm/sag_settings.py --grid docs/images/emoji-adm.png
    python training/emoji_adm/sag_settings.py --write

Frechet distance between samples and the training pictures, on the 64 features of the classifier
in ../emoji/features.py, which sees the pictures enlarged to 64x64; all settings start from the
same noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from classes import load_small
from sampling import load, sample, to_images
from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from self_attention_guidance.generate import draw_grid
from shared import data, features
from shipping import SHIPPED, write_json

STEPS = 25
GRID_SEEDS = 10

MID = "mid_block.attentions.0"  # 8x8
LAST = "up_blocks.1.attentions.2"  # 16x16
BLUR: dict[str, Any] = {"blur_sigma": 3.0, "blur_kernel_size": 9}
EARLY: dict[str, Any] = {"scale": 4.0, **BLUR, "stop": 0.3}
UNGUIDED = SelfAttentionGuidance(0.0)
RECOMMENDED = SelfAttentionGuidance(1.0, **BLUR, layer=LAST)
CANDIDATES: list[SelfAttentionGuidance | BlurGuidance] = [
    UNGUIDED,
    RECOMMENDED,
    SelfAttentionGuidance(1.0, **BLUR, layer=MID),
    SelfAttentionGuidance(**EARLY, layer=LAST),
    SelfAttentionGuidance(**EARLY, layer=MID),
    BlurGuidance(**EARLY),
]
SETTINGS: dict[str, Any] = {
    "guidance": {
        name: getattr(RECOMMENDED, name)
        for name in ("scale", "blur_sigma", "blur_kernel_size", "start", "stop", "layer")
    },
    "generation": {"num_inference_steps": STEPS},
}


def enlarged(pixels: Tensor) -> Tensor:
    """Pictures of 32x32 pixels as the classifier takes them, 64x64, each pixel four times."""
    return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)


def reference_pixels(work: Path) -> Tensor:
    """The training pictures, enlarged."""
    pictures = data.pictures(work / "data")
    return enlarged(load_small([picture for picture in pictures if picture.in_broad]))


def measure(options: argparse.Namespace) -> None:
    """Print the Frechet distance of the chosen candidates, one JSON line each."""
    real = reference_pixels(options.work)
    classifier = features.train_classifier(real, options.work / "classifier.pt")
    # The model learned every picture mirrored too.
    wanted = features.extract(classifier, torch.cat([real, real.flip(-1)]))
    pipe = load(options.model)
    seeds = range(options.first_seed, options.first_seed + options.count)
    for guidance in (CANDIDATES[number] for number in options.candidates):
        # half the time of float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = sample(pipe, guidance, seeds, options.steps)
        found = features.extract(classifier, enlarged(drawn))
        distance = round(features.frechet_distance(found, wanted), 2)
        told = {"form": type(guidance).__name__, **asdict(guidance), "frechet": distance}
        print(json.dumps(told), flush=True)


def rows_of(
    options: argparse.Namespace,
    candidates: Sequence[SelfAttentionGuidance | BlurGuidance],
    columns: int,
) -> list[list[Image.Image]]:
    """A row per candidate, a column per seed from 0 on."""
    pipe = load(options.model)
    drawn = [sample(pipe, guidance, range(columns), options.steps) for guidance in candidates]
    return [to_images(pixels) for pixels in drawn]


def sheet(options: argparse.Namespace, columns: int = 14) -> Image.Image:
    """A contact sheet to look at: a row per candidate."""
    rows = rows_of(options, [CANDIDATES[number] for number in options.candidates], columns)
    canvas = Image.new("RGB", (columns * 98, len(rows) * 98), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            large = image.resize((96, 96), Image.Resampling.NEAREST)
            canvas.paste(large, (column * 98, number * 98))
    return canvas


def grid(options: argparse.Namespace) -> Image.Image:
    """The picture of the documentation: the first seeds, without and with guidance."""
    rows = rows_of(options, [UNGUIDED, RECOMMENDED], GRID_SEEDS)
    return draw_grid(
        rows,
        labels=["unguided", f"SAG, scale {RECOMMENDED.scale:g}"],
        headings=[f"seed {seed}" for seed in range(GRID_SEEDS)],
        footer=f"emoji-adm, 32x32, no class given, {options.steps} steps of DDPM; "
        "the first seeds, not picked",
    )


def main() -> None:
    """Measure, draw or write, as asked."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.write:
        write_json(options.model / "sag_settings.json", SETTINGS)
    elif options.grid:
        grid(options).save(options.grid, optimize=True)
    elif options.sheet:
        sheet(options).save(options.sheet)
    else:
        measure(options)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = range(len(CANDIDATES))
    parser.add_argument("--work", type=Path, help="folder of the training run, for measuring")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="default: the shipped model")
    parser.add_argument("--count", type=int, default=512, help="samples; default: %(default)s")
    parser.add_argument("--first-seed", type=int, default=70_000, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--candidates", nargs="+", type=int, choices=numbers, default=numbers)
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet instead of measuring")
    parser.add_argument("--grid", type=Path, help="draw the picture of the documentation")
    parser.add_argument("--write", action="store_true", help="write the recommended settings")
    options = parser.parse_args()
    if not (options.work or options.write or options.grid or options.sheet):
        parser.error("measuring needs --work")
    return options


if __name__ == "__main__":
    main()
