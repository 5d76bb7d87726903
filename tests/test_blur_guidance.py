"""Blur guidance, the form without a mask, on Stable Diffusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from self_attention_guidance import (
    BlurGuidance,
    SelfAttentionGuidance,
    StableDiffusionSAGPipeline,
)
from tiny import tiny_pipeline


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return pipe(
        "red",
        height=64,
        width=80,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
        **arguments,
    )[0]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_it_is_self_attention_guidance_with_a_full_mask(guidance_scale: float, branch: Any) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    plain = draw(pipe, guidance_scale=guidance_scale)
    with SelfAttentionGuidance(1.5, blur_sigma=2.0, threshold=0.0, branch=branch).attach(pipe):
        expected = draw(pipe, guidance_scale=guidance_scale)
    with BlurGuidance(1.5, blur_sigma=2.0, branch=branch).attach(pipe) as handle:
        found = draw(pipe, guidance_scale=guidance_scale)
    assert torch.equal(found, expected)
    assert (found - plain).abs().max() > 1e-2
    assert handle.steps == 3
    assert handle.attention is None
    assert handle.mask is not None
    assert handle.mask.shape == (1, 8, 10)
    assert handle.mask.all()
    assert torch.equal(draw(pipe, guidance_scale=guidance_scale), plain)


def test_the_drop_in_pipeline_takes_it() -> None:
    sag = tiny_pipeline(StableDiffusionSAGPipeline)
    masked = draw(sag)
    sag.guidance = BlurGuidance(blur_sigma=1.0)
    blurred = draw(sag)
    assert (masked - blurred).abs().max() > 1e-3
    with BlurGuidance(0.75).attach(sag):
        assert torch.equal(draw(sag, sag_scale=0), blurred)


def test_a_part_of_the_steps_can_be_guided() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    with BlurGuidance(1.0, start=0.3, stop=0.6).attach(pipe) as handle:
        draw(pipe)
    assert handle.steps == 1


@pytest.mark.parametrize(
    "settings", [{"blur_sigma": -1}, {"blur_kernel_size": 4}, {"start": 1.0}, {"branch": "both"}]
)
def test_blur_guidance_checks_its_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        BlurGuidance(1.0, **settings)
