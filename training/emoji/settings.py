"""Measure settings of Self-Attention Guidance on the exported model, and store the chosen ones.

    python training/emoji/settings.py --work DIR [--count 512]
    python training/emoji/settings.py --work DIR --sheet FILE.png
    python training/emoji/settings.py --write

Frechet distance between samples and the vocabulary's pictures, on the 64 features of the
classifier in features.py; all settings start from the same noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import data
import features
from evaluate import SHIPPED, generate, load
from self_attention_guidance import SelfAttentionGuidance

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
LAST = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"
STEPS = 12
# Three ways to sample: nothing asked for, a caption alone, a caption with CFG.
MODES: dict[str, tuple[bool, float]] = {
    "empty prompt": (False, 1.0),
    "caption, no CFG": (True, 1.0),
    "caption, CFG 3": (True, 3.0),
}
CANDIDATES: list[dict[str, Any]] = [
    {"scale": 0.0},
    {"scale": 3.0, "blur_sigma": 3.0, "layer": MID, "stop": 0.6},
    {"scale": 1.5, "blur_sigma": 3.0, "layer": MID, "stop": 0.6},
    {"scale": 1.5, "blur_sigma": 3.0, "layer": MID},
    {"scale": 1.5, "blur_sigma": 3.0, "layer": LAST, "stop": 0.6},
    {"scale": 0.75, "blur_sigma": 1.0, "layer": MID},
    {"scale": 5.0, "blur_sigma": 3.0, "layer": MID, "stop": 0.4},
    {"scale": 3.0, "blur_sigma": 3.0, "layer": LAST, "stop": 0.6},
]


def sample(
    pipe: StableDiffusionPipeline,
    settings: dict[str, Any],
    prompts: Sequence[str],
    guidance_scale: float,
    first_seed: int = 70_000,
) -> list[Image.Image]:
    """One picture per prompt with these settings, each from its own seed."""
    guidance = SelfAttentionGuidance(**settings)
    attached = guidance.attach(pipe) if guidance.scale else contextlib.nullcontext()
    with attached:
        return generate(pipe, prompts, first_seed, guidance_scale, STEPS)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as (pictures, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


def measure(
    pipe: StableDiffusionPipeline, work: Path, count: int, modes: Sequence[str], candidates: int
) -> None:
    """Print the Frechet distance of the first `candidates`, `count` samples each, mode by mode."""
    broad = [picture for picture in data.pictures(work / "data") if picture.in_broad]
    pixels = data.load_pixels(broad)
    classifier = features.train_classifier(pixels, work / "classifier.pt")
    rows = [row for row, picture in enumerate(broad) if picture.in_vocabulary]
    pictures = [broad[row] for row in rows]
    real = features.extract(classifier, pixels[rows])
    captions = [pictures[row % len(pictures)].caption for row in range(count)]
    for mode in modes:
        named, guidance_scale = MODES[mode]
        prompts = captions if named else [""] * count
        for settings in CANDIDATES[:candidates]:
            drawn = to_pixels(sample(pipe, settings, prompts, guidance_scale))
            distance = features.frechet_distance(features.extract(classifier, drawn), real)
            print(json.dumps({"mode": mode, **settings, "frechet": round(distance, 2)}), flush=True)


def sheet(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance_scale: float
) -> Image.Image:
    """A contact sheet to look at: a column per prompt, a row per candidate."""
    canvas = Image.new("RGB", (len(prompts) * 100, len(CANDIDATES) * 100), "white")
    for row, settings in enumerate(CANDIDATES):
        for column, image in enumerate(sample(pipe, settings, prompts, guidance_scale, 0)):
            canvas.paste(
                image.resize((98, 98), Image.Resampling.BICUBIC), (column * 100, row * 100)
            )
    return canvas


# Chosen from the table and the sheets; the model card shows both.
RECOMMENDED: dict[str, Any] = {
    "guidance": {"scale": 3.0, "blur_sigma": 3.0, "layer": MID, "stop": 0.6},
    "generation": {"guidance_scale": 3.0, "num_inference_steps": 25},
    "compare": {
        "prompts": ["", "heart", "fruit", "monster", "strawberry"],
        "sag_scales": [0.0, 1.5, 3.0],
    },
}


def main() -> None:
    """Measure, draw or write, as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of the training run")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="default: the shipped model")
    parser.add_argument("--count", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="first so many")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet instead of measuring")
    parser.add_argument("--prompts", nargs="+", default=RECOMMENDED["compare"]["prompts"] * 2)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write the recommended settings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.write:
        text = json.dumps(RECOMMENDED, indent=2) + "\n"
        (options.model / "sag_settings.json").write_text(text, encoding="utf-8")
    elif options.sheet:
        sheet(load(options.model), options.prompts, options.guidance_scale).save(options.sheet)
    else:
        pipe = load(options.model)
        measure(pipe, options.work, options.count, options.modes, options.candidates)


if __name__ == "__main__":
    main()
