"""Pipelines whose batch is not two halves of the same pictures: guided rightly, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from self_attention_guidance import SelfAttentionGuidance
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

PICTURE = Image.new("RGB", (64, 64), "red")
USUAL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


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
        pytest.raises(ValueError, match="halves of the batch hold different samples"),
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
