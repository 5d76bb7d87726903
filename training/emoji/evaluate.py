"""Measure the exported model: does it draw what the caption says, and does it only copy?

    python training/emoji/evaluate.py --work DIR [--model FOLDER] [--out FILE.json]

Retrieval: captions drawn from the vocabulary, guidance scale 3, 25 steps. A draw counts as a hit
when the caption's own picture is among the five nearest by pixel distance after a light blur.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageFilter
from torch import Tensor

import data
from data import Picture

SHIPPED = Path(__file__).parents[2] / "src/self_attention_guidance/models/builtin/emoji"
BLUR_SIGMA = 1.5  # pixels
DRAWS = 100
BATCH_SIZE = 25
GUIDANCE_SCALE = 3.0
STEPS = 25


def load(folder: Path) -> StableDiffusionPipeline:
    """The exported pipeline, without its progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    first_seed: int,
    guidance_scale: float = GUIDANCE_SCALE,
    steps: int = STEPS,
) -> list[Image.Image]:
    """One picture per caption; picture i has the seed `first_seed + i` to itself."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), BATCH_SIZE):
        chunk = list(captions[start : start + BATCH_SIZE])
        seeds = range(first_seed + start, first_seed + start + len(chunk))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images += pipe(
            chunk, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators
        ).images
    return images


def blurred(image: Image.Image) -> Tensor:
    """A picture as a vector in [0, 1], after a light Gaussian blur."""
    soft = image.convert("RGB").filter(ImageFilter.GaussianBlur(BLUR_SIGMA))
    return torch.from_numpy(np.array(soft)).float().flatten() / 255


def blurred_pictures(pictures: Sequence[Picture]) -> Tensor:
    """Blurred training pictures, (pictures, 12288)."""
    pixels = data.load_pixels(list(pictures)).permute(0, 2, 3, 1).numpy()
    return torch.stack([blurred(Image.fromarray(picture)) for picture in pixels])


def root_mean_square(a: Tensor, b: Tensor) -> Tensor:
    """All distances between two sets of vectors, as root-mean-square pixel difference."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def ranks(drawn: Tensor, candidates: Tensor, targets: Sequence[int]) -> Tensor:
    """How many candidates are nearer to each drawn picture than its own target."""
    distances = root_mean_square(drawn, candidates)
    own = distances[torch.arange(len(targets)), torch.tensor(targets)]
    return (distances < own[:, None]).sum(1)


def draw(
    pipe: StableDiffusionPipeline,
    drawn_from: Sequence[int],
    pictures: Sequence[Picture],
    seed: int,
) -> tuple[list[int], Tensor]:
    """Rows drawn with `seed`, and the blurred pictures that their captions give."""
    targets = random.Random(seed).sample(list(drawn_from), k=DRAWS)
    captions = [pictures[target].caption for target in targets]
    images = generate(pipe, captions, first_seed=1000 * seed)
    return targets, torch.stack([blurred(image) for image in images])


def hits(found: Tensor) -> dict[str, int]:
    """How many draws have their own picture nearest, and among the nearest five."""
    return {"top1": int((found < 1).sum()), "top5": int((found < 5).sum())}


def retrieval(
    pipe: StableDiffusionPipeline, pictures: Sequence[Picture], candidates: Tensor, seed: int
) -> dict[str, Any]:
    """Plain captions, among all pictures and among Google's; then captions of both styles."""
    plain = [row for row, picture in enumerate(pictures) if picture.vendor == "google"]
    targets, drawn = draw(pipe, plain, pictures, seed)
    among_all = ranks(drawn, candidates, targets)
    among_plain = ranks(drawn, candidates[plain], [plain.index(row) for row in targets])
    both_targets, both_drawn = draw(pipe, range(len(pictures)), pictures, seed)
    return {
        "seed": seed,
        "plain": hits(among_all),
        "plain_among_plain": hits(among_plain),
        "plain_and_flat": hits(ranks(both_drawn, candidates, both_targets)),
        "plain_missed": [pictures[targets[row]].caption for row in (among_all >= 5).nonzero()],
    }


def memorisation(
    pipe: StableDiffusionPipeline, pictures: Sequence[Picture], candidates: Tensor, count: int = 100
) -> dict[str, Any]:
    """Distance of samples to the nearest training picture, beside that between the pictures."""
    between = root_mean_square(candidates, candidates)
    between.fill_diagonal_(float("inf"))
    captions = [p.caption for p in random.Random(0).sample(list(pictures), k=count)]
    named = generate(pipe, captions, first_seed=50_000)
    free = generate(pipe, [""] * count, first_seed=60_000, guidance_scale=1.0)
    nearest = {
        "between_pictures": between.min(1).values,
        "captioned": _nearest(named, candidates),
        "empty_prompt": _nearest(free, candidates),
    }
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    return {key: _rounded(value.quantile(points)) for key, value in nearest.items()}


def _nearest(images: Sequence[Image.Image], candidates: Tensor) -> Tensor:
    vectors = torch.stack([blurred(image) for image in images])
    return root_mean_square(vectors, candidates).min(1).values


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def seconds_per_image(pipe: StableDiffusionPipeline) -> float:
    """Wall-clock time of one picture by itself, the best of five."""
    times: list[float] = []
    for seed in range(5):
        began = time.perf_counter()
        generate(pipe, ["grinning face"], first_seed=seed)
        times.append(time.perf_counter() - began)
    return round(min(times), 3)


def evaluate(folder: Path, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Every figure of the model card that needs the training pictures."""
    pipe = load(folder)
    pictures = [picture for picture in data.pictures(work / "data") if picture.in_vocabulary]
    candidates = blurred_pictures(pictures)
    report: dict[str, Any] = {"retrieval": []}
    for seed in seeds:
        report["retrieval"].append(retrieval(pipe, pictures, candidates, seed))
        print(json.dumps(report["retrieval"][-1]), flush=True)
    report["nearest_picture_quantiles"] = memorisation(pipe, pictures, candidates)
    report["seconds_per_image"] = seconds_per_image(pipe)
    return report


def main() -> None:
    """Evaluate and print, or write, the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="default: the shipped model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of draws")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the report here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = json.dumps(evaluate(options.model, options.work, options.seeds), indent=2)
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
