"""Pipelines around networks of random weights that are made on the device itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from shared import (
    default_dtype,
    sd15_unet,
    sdxl_unet,
    sharpen,
)

_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_TINY_UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TINY_XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
_TINY_FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


@dataclass(frozen=True)
class Kind:
    """What is the same for all networks of a kind, and its full and its tiny size.

    Attributes:
        make: From whether it is tiny to the denoiser, in torch's default type.
        wrap: From the denoiser to its pipeline.
        noise: From the side in latent pixels to the shape of the latents.
        embeddings: Arguments of the pipeline's call and their shapes, for the full size; the
            last one of the tiny size is 32.
        side: Of the latents at full size.
        has_cfg: Whether it is drawn from with classifier-free guidance.
        is_large: Whether its weights are made in their type, as they fit in no other.
    """

    make: Callable[[bool], nn.Module]
    wrap: Callable[[nn.Module], Any]
    noise: Callable[[int], tuple[int, ...]]
    embeddings: Mapping[str, tuple[int, ...]]
    side: int
    has_cfg: bool = True
    is_large: bool = False


@dataclass(frozen=True)
class Subject:
    """A pipeline and the arguments that draw the same picture every time.

    Attributes:
        pipeline: On its device.
        arguments: Of its call.
    """

    pipeline: Any
    arguments: dict[str, Any]

    @property
    def denoiser(self) -> Any:
        """The network that is guided."""
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer

    def draw(self) -> Tensor:
        """Final latents."""
        return self.pipeline(**self.arguments).images


def make_subject(
    name: str, dtype: torch.dtype, device: torch.device, steps: int, is_tiny: bool
) -> Subject:
    """Make a network, its pipeline and the arguments of its call.

    The weights and arguments of a smaller network are those of float32, rounded.

    Args:
        name: A key of `KINDS`.
        dtype: Of the weights.
        device: Where they are made.
        steps: Of a picture.
        is_tiny: Whether the network is a tiny one of the same class.
    """
    kind = KINDS[name]
    made_in = dtype if kind.is_large else torch.float32
    torch.manual_seed(0)
    with default_dtype(made_in), device:
        denoiser = kind.make(is_tiny)
    sharpen(denoiser)
    pipeline = kind.wrap(denoiser.eval().requires_grad_(False).to(dtype))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "output_type": "latent"}
    return Subject(pipeline, arguments | _inputs(kind, dtype, device, is_tiny))


def _inputs(kind: Kind, dtype: torch.dtype, device: torch.device, is_tiny: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = 16 if is_tiny else kind.side
    found: dict[str, Any] = {"height": 8 * side, "width": 8 * side}
    found["latents"] = random(*kind.noise(side))
    for name, shape in kind.embeddings.items():
        sizes = (*shape[:-1], 32) if is_tiny else shape
        found[name] = random(1, *sizes)
        if kind.has_cfg:
            found[f"negative_{name}"] = random(1, *sizes)
    if kind.has_cfg:
        found["guidance_scale"] = 5.0
    return found


def _sd15(is_tiny: bool) -> nn.Module:
    return diffusers.UNet2DConditionModel(**_TINY_UNET) if is_tiny else sd15_unet()


def _sdxl(is_tiny: bool) -> nn.Module:
    return diffusers.UNet2DConditionModel(**_TINY_UNET, **_TINY_XL) if is_tiny else sdxl_unet()


def _flux(is_tiny: bool) -> nn.Module:
    config = _TINY_FLUX if is_tiny else {}
    return diffusers.FluxTransformer2DModel(**config, guidance_embeds=True)


def _stable_diffusion(unet: nn.Module) -> Any:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_BETAS)
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler, **dict.fromkeys(absent)}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _stable_diffusion_xl(unet: nn.Module) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(**_BETAS)
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler, **dict.fromkeys(absent)}
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def _flux_pipeline(transformer: nn.Module) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts: dict[str, Any] = {"scheduler": scheduler, **dict.fromkeys(absent)}
    return diffusers.FluxPipeline(**parts, transformer=transformer)


KINDS: Mapping[str, Kind] = {
    "sd15": Kind(
        _sd15,
        _stable_diffusion,
        lambda side: (1, 4, side, side),
        {"prompt_embeds": (77, 768)},
        side=64,
    ),
    "sdxl": Kind(
        _sdxl,
        _stable_diffusion_xl,
        lambda side: (1, 4, side, side),
        {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
        side=128,
    ),
    "flux": Kind(
        _flux,
        _flux_pipeline,
        lambda side: (1, side * side // 4, 64),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        side=128,
        has_cfg=False,
        is_large=True,
    ),
}
"""The networks by name."""
