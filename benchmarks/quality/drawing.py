"""Draw samples, and keep of each what the figures need."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bfloat16
from judging import QUESTIONS, critic
from self_attention_guidance import Guidance, attach, builtin_model
from self_attention_guidance.generate import make_scheduler
from self_attention_guidance.generate.counting import counted_rows
from settings import Setting
from tasks import CLASSES, Task, asked_with, encoder

# Seeds from here on are the report's; the search's begin at 0.
FIRST_REPORTED = 500_000
CHUNK = 32


@dataclass(frozen=True)
class Drawn:
    """What is kept of some samples, in the order of their seeds.

    Attributes:
        features: (samples, features) float32.
        right: Whether thing, thing among five, style and background are what was asked for,
            (samples, questions) bool; no columns without captions.
        saturation: Mean saturation of each sample's pixels, from 0 to 1, (samples,) float32.
    """

    features: Tensor
    right: Tensor
    saturation: Tensor


def drawn(task: Task, setting: Setting, seeds: range, folder: Path) -> Drawn:
    """Samples of a task, drawn in chunks that are kept in `folder` and not drawn again.

    Sample i depends on its seed alone.
    """
    parts: list[Drawn] = []
    for start in range(0, len(seeds), CHUNK):
        chunk = seeds[start : start + CHUNK]
        path = folder / f"{_digest(task, setting, chunk)}.pt"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save(vars(_draw(task, setting, chunk)), partial)
            os.replace(partial, path)
        parts.append(Drawn(**torch.load(path, weights_only=True)))
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Drawn(*(torch.cat(column) for column in columns))


def _digest(task: Task, setting: Setting, seeds: range) -> str:
    described = task.description() | setting.to_dict() | {"first": seeds.start, "count": len(seeds)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


@torch.no_grad()
def _draw(task: Task, setting: Setting, seeds: range) -> Drawn:
    is_search = seeds.start < FIRST_REPORTED
    asked = asked_with(seeds, is_search=is_search) if task.has_captions else None
    pipe = pipeline(task.model)
    with ExitStack() as stack:
        rows = stack.enter_context(counted_rows(pipe.unet))
        if setting.guidance:
            stack.enter_context(attach(pipe, *setting.guidance))
        prompts = asked[0].captions(asked[1]) if asked else None
        pictures = run(task, setting, seeds, prompts)
    expected = setting.evaluations * len(seeds)
    if sum(rows) != expected:
        raise RuntimeError(f"{setting}: {sum(rows)} evaluations, where {expected} were expected")
    pixels = (pictures.float() * 255).round().clamp(0, 255).byte()
    right = torch.zeros(len(seeds), 0, dtype=torch.bool)
    if asked:
        right = critic().right(pixels, asked[0].pictures, asked[1])
        assert right.shape[1] == len(QUESTIONS)
    return Drawn(encoder().encode(pixels).features.float(), right, saturation(pixels))


def run(
    task: Task, setting: Setting, seeds: Sequence[int], prompts: list[str] | None, **others: Any
) -> Tensor:
    """Run the task's pipeline with whatever guidance is attached to it.

    Args:
        task: Which pipeline.
        setting: Steps, scale of classifier-free guidance and type of products.
        seeds: One for each sample.
        prompts: Captions, if the task has any.
        **others: Further arguments of the pipeline.

    Returns:
        (samples, 3, height, width), from 0 to 1.
    """
    pipe = pipeline(task.model)
    own = _own_scheduler(task.model)
    pipe.scheduler = make_scheduler(setting.scheduler, own.config) if setting.scheduler else own
    usual: dict[str, Any] = {
        "num_inference_steps": setting.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        **others,
    }
    with bfloat16.autocast() if setting.dtype == "bfloat16" else nullcontext():
        if task.model == "emoji-adm":
            labels = [seed % CLASSES for seed in seeds] if task.conditional else None
            return pipe(batch_size=len(seeds), class_labels=labels, sag_scale=0.0, **usual).images
        texts = prompts or [""] * len(seeds)
        return pipe(texts, guidance_scale=setting.cfg, sag_scale=0.0, **usual).images


def saturation(pixels: Tensor) -> Tensor:
    """Mean saturation of HSV, from 0 to 1, of (samples, 3, height, width) uint8."""
    values = pixels.float() / 255
    largest, least = values.amax(1), values.amin(1)
    return ((largest - least) / largest.clamp(min=1e-6)).mean((1, 2))


def size_of_term(task: Task, guidance: Guidance, cfg: float) -> float:
    """How large the guidance term is at scale 1: its root mean square over some guided steps.

    It is measured on the way of a sampler that the guidance hardly changes.
    """
    squares: list[float] = []
    small = Setting((type(guidance).from_dict({**guidance.to_dict(), "scale": 1e-3}),), 10, cfg)
    seeds = range(4)
    pipe = pipeline(task.model)
    prompts = None
    if task.has_captions:
        pairs, backgrounds = asked_with(seeds, is_search=True)
        prompts = pairs.captions(backgrounds)
    with torch.no_grad(), attach(pipe, *small.guidance) as handle:

        def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if handle.steps > len(squares):
                squares.append(float(handle.term.float().square().mean()))
            return tensors

        run(task, small, seeds, prompts, callback_on_step_end=note)
    return 1e3 * (sum(squares) / len(squares)) ** 0.5


@functools.cache
def _own_scheduler(model: str) -> Any:
    return pipeline(model).scheduler


@functools.cache
def pipeline(model: str) -> Any:
    """A builtin model, loaded once, without guidance of its own."""
    pipe: Any = builtin_model(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe
