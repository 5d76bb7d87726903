"""Pipelines whose batch is not two halves of the same pictures: guided rightly, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from self_attention_guidance import SelfAttentionGuidance
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

PICTURE = Image.new("RGB", (64, 64), "red")
USUAL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.mark.parametrize("pictures", [1, 2])
def test_three_conditions_are_refused_whatever_the_batch(pictures: int) -> None:
    pipe = tiny_pipeline(StableDiffusionInstructPix2PixPipeline, unet=tiny_unet(in_channels=8))
    attached = SelfAttentionGuidance().attach(pipe)
    with attached, pytest.raises(ValueError, match=r"conditional and (an )?unconditional half"):
        pipe(prompt=["red"] * pictures, image=[PICTURE] * pictures, **USUAL)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("pictures", [1, 2])
def test_perturbed_attention_guidance_is_refused(pictures: int, guidance_scale: float) -> None:
    pipe = tiny_pipeline(StableDiffusionPAGPipeline)
    arguments = {"guidance_scale": guidance_scale, "height": 64, "width": 64, **USUAL}
    with SelfAttentionGuidance().attach(pipe) as handle:
        pipe(prompt=["red"] * pictures, pag_scale=0.0, **arguments)
        assert handle.steps == 2
        with pytest.raises(ValueError, match="perturbed-attention guidance is on"):
            pipe(prompt=["red"] * pictures, pag_scale=3.0, **arguments)


def test_inpainting_networks_keep_mask_and_masked_picture() -> None:
    pipe = tiny_pipeline(StableDiffusionInpaintPipeline, unet=tiny_unet(in_channels=9))
    seen: list[torch.Tensor] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = Image.new("L", (64, 64), 255)
    with SelfAttentionGuidance().attach(pipe):
        pipe(prompt=["red"] * 2, image=PICTURE, mask_image=mask, height=64, width=64, **USUAL)
    whole, degraded = seen[:2]
    assert torch.equal(degraded[:, 4:], whole[:2, 4:])
    assert not torch.equal(degraded[:, :4], whole[:2, :4])


def test_halves_of_different_pictures_are_refused() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(2)
    states = torch.randn(2, 7, unet.config.cross_attention_dim)
    layout: dict[str, Any] = {"scheduler": scheduler, "batch_layout": "uncond_first"}
    with (
        SelfAttentionGuidance().attach(unet, **layout),
        pytest.raises(ValueError, match="halves hold different samples"),
    ):
        unet(torch.randn(2, 4, 8, 8), scheduler.timesteps[0], states)


def test_attention_of_only_some_rows_is_refused() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    layer = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    processor = layer.processor

    class FirstRowOnly:
        """Attention that leaves all rows but the first as they are."""

        def __call__(self, attn: Any, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.cat([processor(attn, states[:1]), states[1:]])

    layer.set_processor(FirstRowOnly())
    with SelfAttentionGuidance().attach(pipe), pytest.raises(RuntimeError, match="for 1 of 3 rows"):
        pipe(["red"] * 3, guidance_scale=1.0, height=64, width=64, **USUAL)


def test_another_pipeline_that_runs_the_same_denoiser_is_refused() -> None:
    idle, running = tiny_pipeline(StableDiffusionPipeline), tiny_pipeline(StableDiffusionPipeline)
    running.unet = idle.unet
    running.scheduler = idle.scheduler
    arguments: dict[str, Any] = {"height": 64, "width": 64, **USUAL}
    with SelfAttentionGuidance().attach(idle):
        idle("red", guidance_scale=1.0, **arguments)
        with pytest.raises(ValueError, match="attach to the pipeline that runs"):
            running("red", guidance_scale=5.0, **arguments)
        same = [torch.Generator().manual_seed(0) for _ in range(2)]
        idle(["red", "blue"], guidance_scale=1.0, generator=same, **arguments)
