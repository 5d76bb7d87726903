"""Measure whether guidance helps with text, on captions that the model has never seen.

    python training/emoji_styles/guidance.py --work DIR --model FOLDER --cfg 3 \\
        --guidance sag:scale=1.5 --guidance pag:scale=1

Every guidance draws the same captions from the same seeds as none does. The Fréchet distance is to
the held-out pictures, on the features of the package's own encoder; differences are paired, with
95 % intervals. The judge says whether things, styles and backgrounds are still right. A line for
each goes to DIR/guidance.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import judge
import torch
from torch import Tensor

import data
import evaluate
from self_attention_guidance.evaluate import load_encoder, paired_difference, random_halves
from self_attention_guidance.evaluate.statistics import frechet_distances, moments_of
from self_attention_guidance.guidance import guidance_of
from self_attention_guidance.guidance.text import parse_guidance

REPETITIONS = 400


class Distance:
    """Fréchet distances to the held-out pictures, on the same halves of every set."""

    def __init__(self, reference: Tensor, count: int) -> None:
        """`reference` are pictures, (pictures, 3, 64, 64) from -1 to 1; sets have `count`."""
        self.encoder = load_encoder("emoji")
        self.reference = moments_of(self._features(reference))
        self.halves = random_halves(count, REPETITIONS, data.SEED)

    def __call__(self, drawn: Tensor) -> Tensor:
        """The distance of a set, then those of its halves."""
        rows = self._features(drawn)
        return frechet_distances(rows, moments_of(rows), self.reference, self.halves)

    def _features(self, pictures: Tensor) -> Tensor:
        levels = ((pictures + 1) * 127.5).round().byte()
        return torch.cat([self.encoder.encode(part).features for part in levels.split(100)])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the training run, with the judge")
    add("--model", type=Path, required=True, help="exported model")
    add("--cfg", type=float, nargs="+", default=[3.0], help="CFG scales (default: 3)")
    add("--guidance", action="append", default=[], metavar="METHOD[:NAME=VALUE,...]")
    add("--count", type=int, default=400, help="captions (default: %(default)s)")
    add("--seed", type=int, default=1, help="chooses captions and noise (default: %(default)s)")
    add("--batch-size", type=int, default=25, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="of the CPU (default: torch's)")
    return parser.parse_args()


def main() -> None:
    """Measure, print and append."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    everything = data.load(options.work / "pictures.npz")
    seen, pairs = everything.select(held_out=False), everything.held_out_pairs()
    critic = judge.load(options.work, len(seen.labels))
    task = evaluate.held_out_task(pairs, options.count, options.seed)
    answers = judge.targets(task.dataset.pictures, seen.labels)
    seeds = range(10_000 * options.seed, 10_000 * options.seed + len(task.captions))
    # All held-out pictures are the reference, each on a background of its own.
    distance = Distance(
        evaluate.held_out_task(pairs, len(pairs.pictures), options.seed).shown, len(seeds)
    )
    pipe = evaluate.load(options.model).to(options.device)
    for cfg in options.cfg:
        draw = evaluate.plain(pipe, cfg, options.batch_size)
        without: Tensor | None = None
        for text in ("none", *options.guidance):
            if text == "none":
                drawn = draw(task.captions, seeds)
            else:
                guidance = guidance_of(parse_guidance(text))
                with guidance.attach(pipe):
                    drawn = draw(task.captions, seeds)
            found = distance(drawn)
            without = found if without is None else without
            change = paired_difference(found, without)
            line: dict[str, Any] = {
                "cfg": cfg,
                "guidance": text,
                "captions": len(seeds),
                "seed": options.seed,
                "frechet_distance": round(found[0].item(), 3),
                "change": [round(v, 3) for v in (change.value, change.low, change.high)],
                "right": judge.accuracy(critic, drawn, answers, task.backgrounds),
            }
            with (options.work / "guidance.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
