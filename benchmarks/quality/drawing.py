"""Draw the samples of a point, and encode them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bfloat16
from points import Guidance, Point
from self_attention_guidance import builtin_model
from self_attention_guidance.evaluate import load_encoder
from self_attention_guidance.generate import make_scheduler
from self_attention_guidance.models.builtin import builtin_folder

FIRST_SEED = 200_000
# Scales are matched on seeds that no point uses.
MATCHING_SEEDS = range(190_000, 190_064)
# Terms count as equally large within this share of each other.
_AS_LARGE = 0.04
_MOST_CORRECTIONS = 16
CLASSES = 23


@dataclass(frozen=True)
class Drawn:
    """Samples of some seeds.

    Attributes:
        features: (samples, features) float32, in the order of the seeds.
        rows: Rows that the network was run on, for all samples.
        term_squares: Sum over second passes of the mean square of the guidance term, and how many
            passes: their quotient is the square of its size.
    """

    features: Tensor
    rows: int
    term_squares: tuple[float, int]


def draw(point: Point, guidance: Guidance, seeds: Sequence[int]) -> Drawn:
    """One sample a seed; sample i depends on its seed alone.

    Args:
        point: What to draw.
        guidance: In the place of the point's own.
        seeds: One for each sample.
    """
    pipe = _pipeline(point.model)
    pipe.scheduler = _scheduler(point)
    pipe.guidance = guidance
    pipe.guidance_handle = None
    record = _Record()
    counter = pipe.unet.register_forward_pre_hook(record.count, with_kwargs=True)
    try:
        with bfloat16.autocast():
            pictures = _pictures(pipe, point, seeds, record.note)
    finally:
        counter.remove()
    pixels = (pictures.float() * 255).round().clamp(0, 255).byte()
    return Drawn(
        _encoder().encode(pixels).features.float(), record.rows, (record.squares, record.passes)
    )


def term_size(point: Point, guidance: Guidance) -> float:
    """Root-mean-square of the guidance term over second passes, on the matching seeds."""
    squares, passes = draw(point, guidance, MATCHING_SEEDS).term_squares
    return (squares / passes) ** 0.5


def matched(point: Point) -> Guidance:
    """The point's guidance with the scale whose term is as large as that of `point.like`.

    The size of the term is nearly proportional to the scale, so few corrections do; but where masks
    are random, the least change of the scale draws others, and one may miss by luck.

    Raises:
        RuntimeError: No scale was found.
    """
    guidance = point.guidance
    if point.like is None:
        return guidance
    wanted = term_size(point, point.like)
    for _ in range(_MOST_CORRECTIONS):
        found = term_size(point, guidance)
        if abs(found / wanted - 1) < _AS_LARGE:
            return guidance
        scale = guidance.scale * wanted / found
        guidance = dataclasses.replace(guidance, scale=round(scale, 3))
    raise RuntimeError(f"{point.name}: no scale gives a term of {wanted:.3f}.")


class _Record:
    """What a run costs, and how large its guidance is."""

    def __init__(self) -> None:
        self.rows = 0
        self.squares = 0.0
        self.passes = 0

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass of the network is about to run."""
        self.rows += len(args[0] if args else kwargs["sample"])

    def note(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """A step has ended."""
        handle = pipe.guidance_handle
        if handle is not None and handle.steps > self.passes:
            self.squares += float(handle.term.square().mean()) * (handle.steps - self.passes)
            self.passes = handle.steps
        return tensors


def _pictures(
    pipe: Any, point: Point, seeds: Sequence[int], note: Callable[..., dict[str, Any]]
) -> Tensor:
    usual: dict[str, Any] = {
        "num_inference_steps": point.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        "callback_on_step_end": note,
    }
    if point.model == "emoji-adm":
        labels = [seed % CLASSES for seed in seeds] if point.conditional else None
        return pipe(batch_size=len(seeds), class_labels=labels, **usual).images
    captions = _captions()
    prompts = [captions[seed % len(captions)] if point.conditional else "" for seed in seeds]
    cfg = point.guidance_scale
    return pipe(prompts, guidance_scale=cfg, sag_scale=pipe.guidance.scale, **usual).images


@functools.cache
def _pipeline(model: str) -> Any:
    pipe: Any = builtin_model(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _own_scheduler(model: str) -> Any:
    return _pipeline(model).scheduler


def _scheduler(point: Point) -> Any:
    own = _own_scheduler(point.model)
    return own if point.scheduler is None else make_scheduler(point.scheduler, own.config)


@functools.cache
def _captions() -> list[str]:
    vocabulary = builtin_folder("emoji") / "vocabulary.json"
    return list(json.loads(vocabulary.read_text(encoding="utf-8")))


@functools.cache
def _encoder() -> Any:
    return load_encoder("emoji")
