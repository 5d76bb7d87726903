"""Measure the exported model: does it draw the class, does it only copy, how long does it take?

    python training/emoji_adm/measure.py --work DIR [--model FOLDER]

Distances are root-mean-square differences of 32x32 pictures in [0, 1] from the nearest training
picture, mirrored or not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from classes import CLASSES, labels_of, load_small
from sampling import load, sample
from self_attention_guidance import SelfAttentionGuidance
from self_attention_guidance.models.builtin import recommended_settings
from self_attention_guidance.pipelines.adm import ADMPipeline
from shared import data
from shipping import SHIPPED

STEPS = 25
PER_CLASS = 10
FIRST_SEED = 80_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
UNGUIDED = SelfAttentionGuidance(0.0)


def distances(drawn: Tensor, pixels: Tensor) -> Tensor:
    """From each of the drawn pictures to each training picture, the nearer way round."""
    vectors, scale = drawn.flatten(1).float() / 255, drawn[0].numel() ** -0.5
    ways = (pixels, pixels.flip(-1))
    found = [torch.cdist(vectors, way.flatten(1).float() / 255) * scale for way in ways]
    return torch.minimum(*found)


def quantiles(values: Tensor) -> list[float]:
    """The 5, 25, 50, 75 and 95 % points."""
    return [round(value, 3) for value in values.quantile(torch.tensor(QUANTILES)).tolist()]


def nearest(pipe: ADMPipeline, pixels: Tensor, labels: Tensor) -> dict[str, object]:
    """How far samples are from the pictures, and whether the nearest is of the class asked for."""
    between = distances(pixels, pixels).fill_diagonal_(torch.inf).min(1).values
    asked = torch.arange(len(CLASSES)).repeat_interleave(PER_CLASS)
    seeds = range(FIRST_SEED, FIRST_SEED + len(asked))
    free = distances(sample(pipe, UNGUIDED, seeds, STEPS), pixels)
    named = distances(sample(pipe, UNGUIDED, seeds, STEPS, asked.tolist()), pixels)
    return {
        "samples": len(asked),
        "between_pictures": quantiles(between),
        "no_class": quantiles(free.min(1).values),
        "with_class": quantiles(named.min(1).values),
        "nearest_is_of_class": round(float((labels[named.argmin(1)] == asked).float().mean()), 3),
        "without_asking": round(float((labels[free.argmin(1)] == asked).float().mean()), 3),
    }


def seconds_per_picture(pipe: ADMPipeline, guidance: SelfAttentionGuidance) -> float:
    """Wall-clock time of one picture by itself, the best of five."""
    times: list[float] = []
    for seed in range(5):
        began = time.perf_counter()
        sample(pipe, guidance, [seed], STEPS)
        times.append(time.perf_counter() - began)
    return round(min(times), 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="default: the shipped model")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    broad = [picture for picture in data.pictures(options.work / "data") if picture.in_broad]
    pipe = load(options.model)
    report = nearest(pipe, load_small(broad), labels_of(broad))
    guidance = recommended_settings(options.model).make_guidance()
    report["seconds"] = seconds_per_picture(pipe, UNGUIDED)
    report["seconds_guided"] = seconds_per_picture(pipe, guidance)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
