"""Our pipeline against the one diffusers froze, on epsilon models, where the two must agree."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionSAGPipeline as FrozenPipeline

from self_attention_guidance import StableDiffusionSAGPipeline
from tiny import tiny_pipeline, tiny_scheduler

TOLERANCE = 1e-4
NAMES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
PROMPTS = ["a red apple", "two blue birds"]


@functools.cache
def pipelines() -> tuple[Any, Any]:
    """Our pipeline and the frozen one over the same weights."""
    ours = tiny_pipeline(StableDiffusionSAGPipeline)
    return ours, tiny_pipeline(FrozenPipeline, unet=ours.unet)


def latents(pipe: Any, name: str, width: int, guidance_scale: float, scale: float) -> torch.Tensor:
    """Final latents of a batch of two, 64 by `width` pixels, always from one seed."""
    pipe.scheduler = tiny_scheduler(getattr(diffusers, name))
    return pipe(
        PROMPTS,
        height=64,
        width=width,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        sag_scale=scale,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images


@pytest.mark.supports("formula", pipeline="Stable Diffusion")
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_final_latents_agree(name: str, guidance_scale: float, width: int) -> None:
    ours, frozen = pipelines()
    theirs = latents(frozen, name, width, guidance_scale, 0.75)
    unguided = latents(frozen, name, width, guidance_scale, 0.0)
    got = latents(ours, name, width, guidance_scale, 0.75)
    largest = theirs.abs().max()
    assert (theirs - unguided).abs().max() / largest > 100 * TOLERANCE
    assert (got - theirs).abs().max() / largest < TOLERANCE
