"""Tiny Stable-Diffusion-XL-like components with random weights, beside those of `tiny`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    KolorsPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tiny import (
    TEXT_WIDTH,
    seeded,
    tiny_scheduler,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

NUMBER_WIDTH = 8
"""Channels in which each of the numbers beside the prompt, such as a size, is embedded."""


def xl_unet(
    *, text_width: int = 2 * TEXT_WIDTH, numbers: int = 6, **config: Any
) -> UNet2DConditionModel:
    """Return a small denoiser; the refiner has one text encoder's width and five numbers."""
    settings: dict[str, Any] = {
        "cross_attention_dim": text_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": NUMBER_WIDTH,
        "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": TEXT_WIDTH + numbers * NUMBER_WIDTH,
    }
    return tiny_unet(**{**settings, **config})


def second_text_encoder() -> CLIPTextModelWithProjection:
    """Return a text encoder of other weights than the first one, with a pooled output."""
    first = tiny_text_encoder().config.to_dict()
    with seeded(1):
        return CLIPTextModelWithProjection(CLIPTextConfig(**first)).eval()


def xl_pipeline(cls: type[DiffusionPipeline], **components: Any) -> Any:
    """Return a pipeline of class `cls`; keyword arguments replace or add components."""
    parts: dict[str, Any] = {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "text_encoder_2": second_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "scheduler": tiny_scheduler(EulerDiscreteScheduler),
    }
    if "unet" not in components:
        parts["unet"] = xl_unet()
    if "add_watermarker" in inspect.signature(cls).parameters:
        parts["add_watermarker"] = False
    pipe = cls(**{**parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kolors_pipeline() -> Any:
    """Return Kolors without text encoder: XL's network behind a projection of another text."""
    pytest.importorskip("sentencepiece")  # diffusers' class is not there without it
    unet = xl_unet(encoder_hid_dim=TEXT_WIDTH, encoder_hid_dim_type="text_proj")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = KolorsPipeline(unet=unet, scheduler=tiny_scheduler(EulerDiscreteScheduler), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_kolors(pipe: Any, seeds: tuple[int, ...] = (3,), cfg: float = 3.0, **more: Any) -> Tensor:
    """Final latents of a prompt and a seed each, not square."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = {
        f"{prefix}{name}": torch.cat([torch.randn(shape, generator=each) for each in made])
        for prefix in ("", "negative_")
        for name, shape in {
            "prompt_embeds": (1, 5, TEXT_WIDTH),
            "pooled_prompt_embeds": (1, TEXT_WIDTH),
        }.items()
    }
    settings = {"num_inference_steps": 3, "height": 64, "width": 96, "output_type": "latent"}
    return pipe(**{**texts, **settings, "guidance_scale": cfg, "generator": made, **more}).images
