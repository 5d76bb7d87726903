"""The methods that weaken layers, and a tiny pipeline of every kind of network to try them on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

import test_guidance
import tiny_pixels
import tiny_transformers
from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TokenPerturbationGuidance,
)
from self_attention_guidance.models.originals import dit_scheduler
from test_dit_pipeline import with_1001_labels
from tiny import tiny_pipeline, tiny_vae
from tiny_transformers import TRANSFORMERS
from tiny_xl import draw_kolors, kolors_pipeline, xl_pipeline

METHODS: dict[str, Any] = {
    "pag": PerturbedAttentionGuidance,
    "seg": SmoothedEnergyGuidance,
    "slg": SkipLayerGuidance,
    "tpg": TokenPerturbationGuidance,
}


@dataclass(frozen=True)
class Kind:
    """A tiny pipeline.

    Attributes:
        make: A new one.
        draw: Its result of 3 steps, (pictures, ...), of seeds, with a weight of CFG; not square
            where the pipeline allows it.
    """

    make: Callable[[], Any]
    draw: Callable[..., Tensor]


def draw_prompts(pipe: Any, seeds: tuple[int, ...] = (3,), cfg: float = 3.0, **more: Any) -> Tensor:
    # By the seed, so that a picture drawn alone has the prompt that it has in a batch.
    prompts = [("red", "a blue apple", "")[seed % 3] for seed in seeds]
    return test_guidance.draw(
        pipe, seeds, **{"guidance_scale": cfg, "prompt": prompts, "width": 96, **more}
    )


def draw_dit(pipe: Any, seeds: tuple[int, ...] = (3,), cfg: float = 3.0, **more: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"guidance_scale": cfg, "num_inference_steps": 3, "output_type": "np", **more}
    return torch.as_tensor(pipe(list(seeds), generator=generators, **settings).images)


def draw_pixels(pipe: Any, seeds: tuple[int, ...] = (3,), cfg: float = 3.0, **more: Any) -> Tensor:
    """There is no CFG."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 3, "output_type": "np", **more}
    return torch.as_tensor(pipe(len(seeds), generator=generators, **settings).images)


def pixel_pipeline() -> Any:
    pipe = DDIMPipeline(tiny_pixels.tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_transformer(
    name: str, pipe: Any, seeds: tuple[int, ...] = (3,), cfg: float = 3.0, **more: Any
) -> Tensor:
    return tiny_transformers.draw(name, pipe, seeds, cfg, **more)


def dit_pipeline() -> Any:
    pipe = DiTPipeline(with_1001_labels(), tiny_vae(), dit_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


KINDS: dict[str, Kind] = {
    "Stable Diffusion": Kind(lambda: tiny_pipeline(StableDiffusionPipeline), draw_prompts),
    "Stable Diffusion XL": Kind(lambda: xl_pipeline(StableDiffusionXLPipeline), draw_prompts),
    "Kolors": Kind(kolors_pipeline, draw_kolors),
    "ADM and IDDPM": Kind(pixel_pipeline, draw_pixels),
    "DiT": Kind(dit_pipeline, draw_dit),
    **{
        name: Kind(transformer.make, functools.partial(draw_transformer, name))
        for name, transformer in TRANSFORMERS.items()
    },
}


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.components["unet" if "unet" in pipe.components else "transformer"]


def traces(pipe: Any) -> list[Any]:
    """Everything of a denoiser that guidance might leave behind."""
    found: list[Any] = []
    for module in denoiser_of(pipe).modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        processor = id(getattr(module, "processor", None))
        found.append((type(module), hooks, processor, sorted(vars(module))))
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
