"""Measure what the model draws for captions that it has never seen.

    python training/emoji_styles/evaluate.py --work DIR [--snapshots FILES] [--grid FILE.png]

The captions name held-out pairs: things that training showed in other styles only. The judge of
`judge.py` says whether background, style and thing are right. The distance to the nearest
training picture says whether the model copies. Each call appends a line to DIR/evaluation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judge
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

import data
import export

STEPS = 25

# Draws one picture for each caption, each with its own seed: (captions, 3, 64, 64) from -1 to 1.
# A guided pipeline is measured by passing what another function of this type draws to `report`.
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Task:
    """Held-out pictures, and the background to ask for with each."""

    dataset: data.Dataset
    backgrounds: Tensor

    @property
    def captions(self) -> list[str]:
        """What the model is asked for."""
        names = list(data.BACKGROUNDS)
        return [
            picture.caption(names[background])
            for picture, background in zip(
                self.dataset.pictures, self.backgrounds.tolist(), strict=True
            )
        ]

    @property
    def shown(self) -> Tensor:
        """The held-out pictures on those backgrounds, (pictures, 3, 64, 64) from -1 to 1."""
        return data.on_background(self.dataset.pixels, data.palette()[self.backgrounds])


def held_out_task(pairs: data.Dataset, count: int, seed: int = 0) -> Task:
    """`count` held-out pairs, drawn by `seed`, each on a background drawn at random."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(pairs.pictures)), k=min(count, len(pairs.pictures)))
    backgrounds = torch.tensor([rng.randrange(len(data.BACKGROUNDS)) for _ in rows])
    return Task(
        data.Dataset([pairs.pictures[row] for row in rows], pairs.pixels[rows]), backgrounds
    )


def load(folder: Path) -> StableDiffusionPipeline:
    """An exported model."""
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def plain(pipe: StableDiffusionPipeline, guidance_scale: float, batch_size: int) -> Draw:
    """Draws with `pipe` and classifier-free guidance alone."""
    pipe.set_progress_bar_config(disable=True)

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        images: list[Image.Image] = []
        for start in range(0, len(captions), batch_size):
            chunk = slice(start, start + batch_size)
            images += pipe(
                list(captions[chunk]),
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
            ).images
        return torch.stack([to_tensor(image) for image in images])

    return draw


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (3, 64, 64) from -1 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_image(picture: Tensor) -> Image.Image:
    """The opposite of `to_tensor`."""
    return Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def report(
    drawn: Tensor, task: Task, seen: data.Dataset, critic: judge.Judge, labels: Sequence[str]
) -> dict[str, Any]:
    """Every figure of what was drawn for the captions of `task`."""
    answers = judge.targets(task.dataset.pictures, labels)
    return {
        "right": judge.accuracy(critic, drawn, answers, task.backgrounds),
        "right_of_real_pictures": judge.accuracy(critic, task.shown, answers, task.backgrounds),
        "distance": memorisation(drawn, task, seen),
    }


def small(pictures: Tensor) -> Tensor:
    """Pictures as vectors from 0 to 1, averaged down to 32x32."""
    return avg_pool2d(pictures, 2).flatten(1) / 2 + 0.5


def memorisation(drawn: Tensor, task: Task, seen: data.Dataset) -> dict[str, float]:
    """Medians of root-mean-square differences of pixels, all on the background asked for.

    `to_training`: from each sample to the nearest training picture, whatever it shows.
    `between_styles`: from each held-out picture to the nearest of the same thing in training.
    `between_styles_all`: the same to every one of them. A model that copies is far below.
    `to_held_out`: from each sample to the picture that it should resemble.
    """
    nearest, between, own = [], [], small(task.shown)
    samples, columns = small(drawn), range(len(drawn))
    labels = [picture.label for picture in seen.pictures]
    between_all: list[Tensor] = []
    for background in task.backgrounds.unique().tolist():
        colours = data.palette()[background].expand(len(seen.pixels), -1)
        parts = zip(seen.pixels.split(500), colours.split(500), strict=True)
        training = torch.cat([small(data.on_background(*part)) for part in parts])
        rows = [row for row in columns if task.backgrounds[row] == background]
        nearest.append(distances(samples[rows], training).min(1).values)
        for row in rows:
            same = [
                n for n, label in enumerate(labels) if label == task.dataset.pictures[row].label
            ]
            between_all.append(distances(own[row : row + 1], training[same])[0])
            between.append(between_all[-1].min())
    to_held_out = (samples - own).square().mean(1).sqrt()
    found = {
        "to_training": torch.cat(nearest),
        "between_styles": torch.stack(between),
        "between_styles_all": torch.cat(between_all),
        "to_held_out": to_held_out,
    }
    return {name: round(values.median().item(), 4) for name, values in found.items()}


def distances(a: Tensor, b: Tensor) -> Tensor:
    """All root-mean-square differences between two sets of vectors."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def write_grid(file: Path, drawn: Tensor, task: Task, columns: int = 12, rows: int = 4) -> None:
    """Samples, and below each row the held-out pictures that were asked for."""
    count = min(columns * rows, len(drawn))
    lines: list[Tensor] = []
    for start in range(0, count - count % columns, columns):
        for pictures in (drawn, task.shown):
            lines.append(torch.cat(list(pictures[start : start + columns]), dim=2))
        print(" | ".join(task.captions[start : start + columns]))
    sheet = to_image(torch.cat(lines, dim=1))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(file)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, help="exported model (default: DIR's checkpoint)")
    parser.add_argument(
        "--snapshots", type=Path, nargs="+", metavar="FILE", help="of training, each measured"
    )
    parser.add_argument("--groups", nargs="+", help="ask for things of these groups only")
    parser.add_argument("--count", type=int, default=200, help="captions (default: %(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 5.0], help="CFG scales")
    parser.add_argument("--grid", type=Path, help="show what was drawn, at the last scale")
    parser.add_argument("--seed", type=int, default=0, help="chooses captions (default: 0)")
    parser.add_argument("--batch-size", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    return parser.parse_args()


def main() -> None:
    """Measure, print and append."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    everything = data.load(options.work / "pictures.npz")
    seen = everything.select(held_out=False)
    pairs = everything.held_out_pairs().of_groups(options.groups)
    critic = judge.load(options.work, len(seen.labels))
    task = held_out_task(pairs, options.count, options.seed)
    for learned, pipe in models(options):
        pipe.to(options.device)
        for scale in options.scales:
            draw = plain(pipe, scale, options.batch_size)
            drawn = draw(task.captions, range(len(task.captions)))
            if options.grid:
                write_grid(options.grid, drawn, task)
            line: dict[str, Any] = {
                **learned,
                "groups": options.groups,
                "captions": len(task.captions),
                "caption_seed": options.seed,
                "guidance_scale": scale,
                **report(drawn, task, seen, critic, seen.labels),
            }
            with (options.work / "evaluation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def models(
    options: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], StableDiffusionPipeline]]:
    """Each model to measure, with its name and how long it has learned."""
    if options.model:
        yield {"model": str(options.model)}, load(options.model)
        return
    for file in options.snapshots or [options.work / "unet.pt"]:
        # A copy: training may go on, and write its checkpoint anew, meanwhile.
        state = torch.load(file, weights_only=True, map_location="cpu")
        learned = {key: state[key] for key in ("hours", "step", "samples")}
        yield {"model": file.stem, **learned}, export.assemble(options.work, state)


if __name__ == "__main__":
    main()
