"""Tiny Stable-Diffusion-like components with random weights, built from configs alone.

Randomly initialised attention is almost uniform: every position receives about 1.0, which is
the threshold, so the mask would be decided by rounding. `sharpen` scales the query and key
weights up until attention is peaked, as it is in a trained network.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT_WIDTH = 32
VAE_FACTOR = 8
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion; every scheduler here is built with it."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generator at `seed` and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def sharpen(model: torch.nn.Module, factor: float = 4.0) -> None:
    """Multiply the query and key weights of every self-attention layer by `factor`."""
    for name, module in model.named_modules():
        if isinstance(module, Attention) and name.endswith("attn1"):
            module.to_q.weight.mul_(factor)
            module.to_k.weight.mul_(factor)


def tiny_unet(
    *, seed: int = 0, heads: int | list[int] = 4, levels: int = 2, **config: Any
) -> UNet2DConditionModel:
    """Return a small denoiser; `heads` may be a list with one count per level."""
    widths = (32, 64, 64)[:levels]
    down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": down,
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": heads,
    }
    with seeded(seed):
        unet = UNet2DConditionModel(**{**settings, **config}).eval()
    sharpen(unet)
    with torch.no_grad():  # the output should have the size of noise
        unet.conv_out.weight.mul_(2.0)
    return unet


def aligned(model: Any) -> Any:
    """Copy the weights of a loaded model, or of a pipeline's, to memory of torch's own.

    Those of a safetensors file may lie anywhere in memory, and on some processors kernels round
    differently by where it is.
    """
    parts = getattr(model, "components", {"": model}).values()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    return model


def tiny_vae(*, seed: int = 0) -> AutoencoderKL:
    """Return an autoencoder of factor 8 with 4 latent channels."""
    with seeded(seed):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
        ).eval()


def tiny_text_encoder(*, seed: int = 0) -> CLIPTextModel:
    """Return a two-layer text encoder that fits `tiny_tokenizer`."""
    tokens = len(tiny_tokenizer())
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    with seeded(seed):
        return CLIPTextModel(config).eval()


def _vocabulary() -> list[str]:
    letters = [chr(code) for code in range(33, 127)]
    ends = [letter + "</w>" for letter in letters]
    return [*letters, *ends, "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]


@functools.cache
def tiny_tokenizer() -> CLIPTokenizer:
    """Return a byte-level tokenizer over ASCII with two merges."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = {token: index for index, token in enumerate(_vocabulary())}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = "#version: 0.2\nr e\nre d</w>\n"
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


def tiny_image_encoder(*, seed: int = 0) -> CLIPVisionModelWithProjection:
    """Return an image encoder for IP-Adapter, 32x32 pixels in."""
    with seeded(seed):
        return CLIPVisionModelWithProjection(_vision_config()).eval()


def tiny_feature_extractor() -> CLIPImageProcessor:
    """Return the preprocessing that fits the tiny safety checker and image encoder."""
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def tiny_safety_checker(*, seed: int = 0) -> StableDiffusionSafetyChecker:
    """Return a safety checker with random weights."""
    text = CLIPTextConfig(
        hidden_size=TEXT_WIDTH, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=_vision_config().to_dict(),
        projection_dim=TEXT_WIDTH,
    )
    with seeded(seed):
        return StableDiffusionSafetyChecker(config).eval()


def tiny_scheduler(
    cls: type[SchedulerMixin] = DDIMScheduler, prediction_type: str = "epsilon", **config: Any
) -> SchedulerMixin:
    """Return a scheduler over Stable Diffusion's noise schedule, x0 unclipped where it can be."""
    usual = {**BETAS, "clip_sample": False, "steps_offset": 1}  # as in Stable Diffusion's config
    known = inspect.signature(cls).parameters
    settings = {name: value for name, value in usual.items() if name in known}
    return cls(**{**settings, "prediction_type": prediction_type, **config})


def tiny_pipeline(
    cls: type[DiffusionPipeline],
    *,
    prediction_type: str = "epsilon",
    scheduler: SchedulerMixin | None = None,
    seed: int = 0,
    **components: Any,
) -> Any:
    """Return a pipeline of class `cls`; keyword arguments replace or add components."""
    parts: dict[str, Any] = {
        "vae": tiny_vae(seed=seed),
        "text_encoder": tiny_text_encoder(seed=seed),
        "tokenizer": tiny_tokenizer(),
        "scheduler": scheduler or tiny_scheduler(prediction_type=prediction_type),
        "safety_checker": None,
        "feature_extractor": None,
    }
    if "unet" not in components:
        parts["unet"] = tiny_unet(seed=seed)
    parts.update(components)
    checks_safety = parts["safety_checker"] is not None
    pipe = cls(**parts, requires_safety_checker=checks_safety)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_model(folder: Path, settings: object = None) -> Path:
    """Save a model of 64x64 pictures, and its `sag_settings.json` if `settings` are given."""
    tiny_pipeline(StableDiffusionPipeline).save_pretrained(folder)
    if settings is not None:
        (folder / "sag_settings.json").write_text(json.dumps(settings))
    return folder


def put_into_hub_cache(folder: Path, cache: Path, repository: str) -> None:
    """Lay a model's folder where the hub's library keeps what it has downloaded."""
    revision = "0" * 40
    kept = cache / f"models--{repository.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision, encoding="utf-8")
    shutil.copytree(folder, kept / "snapshots" / revision)
