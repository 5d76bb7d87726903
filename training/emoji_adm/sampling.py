"""Draw with the exported model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from self_attention_guidance.pipelines.adm import ADMPipeline

BATCH_SIZE = 64


def load(folder: Path) -> ADMPipeline:
    """The exported pipeline, without its progress bar."""
    pipe = ADMPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: ADMPipeline,
    guidance: SelfAttentionGuidance | BlurGuidance,
    seeds: Sequence[int],
    steps: int,
    labels: Sequence[int] | None = None,
) -> Tensor:
    """One picture a seed, (pictures, 3, 32, 32) uint8; without `labels`, of any class."""
    pipe.guidance = guidance
    chunks: list[Tensor] = []
    for start in range(0, len(seeds), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        drawn = pipe(
            batch_size=len(generators),
            class_labels=None if labels is None else list(labels[part]),
            num_inference_steps=steps,
            generator=generators,
            output_type="pt",
        ).images
        chunks.append((drawn * 255).round().byte())
    return torch.cat(chunks)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of (pictures, 3, height, width) uint8."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
