"""One guided step as pictures: prediction, attention, mask, blurred prediction and term."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..guidance import GuidanceHandle
from ..maths import degrade

_MOST_ATTENTION = 3.0


def step_pictures(pipeline: Any, handle: GuidanceHandle, side: int) -> dict[str, Image.Image]:
    """Draw the last second pass for the first picture of the batch.

    Args:
        pipeline: The pipeline that `handle` guides.
        handle: After a second pass.
        side: The longer side of the pictures, in pixels.

    Returns:
        Pictures by heading; attention and mask only for guidances that have them. Attention is
        black at 0 and brightest at three times the mean; the term is black where it is 0 and
        brightest at its largest.

    Raises:
        ValueError: The model's latents can't be shown.
    """
    assert handle.x0 is not None and handle.term is not None
    x0, guidance = handle.x0[:1], handle.guidance
    drawn = {"predicted x0": _decoded(pipeline, x0)}
    if handle.attention is not None:
        drawn["attention received"] = _heat(handle.attention[0] / _MOST_ATTENTION)
    if handle.mask is not None:
        mask = handle.mask[:1]
        blurred = degrade(x0, mask, guidance.blur_sigma, guidance.blur_kernel_size)
        drawn |= {"mask": _heat(mask[0].float()), "blurred x0": _decoded(pipeline, blurred)}
    height, width = x0.shape[-2:]
    term = _strength(handle.term[0], height, width)
    drawn["guidance term"] = _heat(term / term.max().clamp(min=1e-12))
    size = (side * width // max(x0.shape[-2:]), side * height // max(x0.shape[-2:]))
    smooth = Image.Resampling.BICUBIC
    sharp = Image.Resampling.NEAREST
    return {
        heading: picture.resize(size, smooth if picture.width * 4 > size[0] else sharp)
        for heading, picture in drawn.items()
    }


def _strength(term: Tensor, height: int, width: int) -> Tensor:
    """Root mean square of a term over its channels, (rows, columns)."""
    if term.ndim == 3:
        return term.square().mean(dim=0).sqrt()
    # Packed latents, (tokens, channels): each token holds a square of the latents.
    strength = term.square().mean(dim=-1).sqrt()
    side = round((height * width / len(strength)) ** 0.5)
    return strength.unflatten(0, (height // side, width // side))


@torch.no_grad()
def _decoded(pipeline: Any, latents: Tensor) -> Image.Image:
    config = pipeline.vae.config
    if not hasattr(config, "scaling_factor"):
        raise ValueError(f"the latents of {type(pipeline.vae).__name__} can't be shown by step")
    latents = latents.to(pipeline.vae.device, pipeline.vae.dtype) / config.scaling_factor
    shift = getattr(config, "shift_factor", None) or 0.0
    decoded = pipeline.vae.decode(latents + shift).sample
    return pipeline.image_processor.postprocess(decoded.float().cpu())[0]


def _heat(values: Tensor) -> Image.Image:
    """Values from 0 to 1 as colours from black over orange to near white."""
    pixels = (values.clamp(0, 1) * 255).round().byte().cpu().numpy()
    return ImageOps.colorize(Image.fromarray(pixels), "#12091f", "#fff4d6", mid="#e4572e")
