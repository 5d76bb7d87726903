"""Networks of known sizes with random weights, so that nothing has to be downloaded.

Time does not depend on what weights hold. What does depend on it is the mask: attention of fresh
weights is uniform, rounding would decide what is blurred, and two implementations of the same
method would differ. Self-attention is therefore sharpened.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn

from self_attention_guidance.pipelines.stable_diffusion import StableDiffusionSAGPipeline
from self_attention_guidance.pipelines.stable_diffusion_xl import StableDiffusionXLSAGPipeline

_SHARPNESS = 4.0
_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def sd15_unet() -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion 1.5's configuration; torch's default type, random weights."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl_unet() -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion XL's configuration; torch's default type, random weights."""
    return UNet2DConditionModel(**_SDXL)


def stable_diffusion(
    make_unet: Callable[[], UNet2DConditionModel], dtype: torch.dtype
) -> StableDiffusionSAGPipeline:
    """A pipeline around a U-Net of random weights; it takes embeddings, as it has no text encoder.

    Args:
        make_unet: Makes the U-Net in torch's default type.
        dtype: Type of the weights.
    """
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_BETAS)
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    parts: dict[str, Any] = {"scheduler": scheduler, **dict.fromkeys(absent)}
    parts |= _random_parts(make_unet, dtype)
    return StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)


def stable_diffusion_xl(
    make_unet: Callable[[], UNet2DConditionModel], dtype: torch.dtype
) -> StableDiffusionXLSAGPipeline:
    """The same for Stable Diffusion XL.

    Args:
        make_unet: Makes the U-Net in torch's default type.
        dtype: Type of the weights.
    """
    scheduler = EulerDiscreteScheduler(**_BETAS)
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts: dict[str, Any] = {"scheduler": scheduler, **dict.fromkeys(absent)}
    parts |= _random_parts(make_unet, dtype)
    return StableDiffusionXLSAGPipeline(**parts, add_watermarker=False)


def _random_parts(
    make_unet: Callable[[], UNet2DConditionModel], dtype: torch.dtype
) -> dict[str, Any]:
    # Weights are made in their type: converting them would be the peak of a process's memory.
    with torch.random.fork_rng(devices=[]), default_dtype(dtype):
        torch.manual_seed(0)
        unet = make_unet().eval()
        sharpen(unet)
        # Latents are timed, so that the smallest decoder with the right factor of 8 will do.
        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (32,) * 4,
        }
        vae = AutoencoderKL(**blocks, latent_channels=4)
    return {"unet": unet, "vae": vae.eval()}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """Networks made inside the `with` statement have weights of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def sharpen(denoiser: nn.Module) -> None:
    """Make attention peaked, as in trained networks: else rounding would decide the mask."""
    for name, weight in denoiser.named_parameters():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            weight.mul_(_SHARPNESS)
        elif name.endswith(("attn.norm_q.weight", "attn.norm_k.weight")):
            weight.mul_(_SHARPNESS**0.5)
