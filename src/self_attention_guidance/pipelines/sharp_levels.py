"""Noise levels of DDPM and DDIM schedulers without the rounding of float32."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor


@contextmanager
def sharp_noise_levels(scheduler: Any) -> Generator[None]:
    """Give a DDPM or DDIM scheduler its noise levels in float64 inside the `with` statement.

    diffusers computes them in float32. There, 1 - alphas_cumprod has lost most of its digits at
    the least noisy steps of a cosine schedule. Levels that do not follow from the config are not
    changed.

    Args:
        scheduler: A `DDPMScheduler` or `DDIMScheduler`; others are not changed.
    """
    levels = _sharp_levels(scheduler)
    if levels is None:
        yield
        return
    own = scheduler.alphas_cumprod
    scheduler.alphas_cumprod = levels
    try:
        yield
    finally:
        scheduler.alphas_cumprod = own


def _sharp_levels(scheduler: Any) -> Tensor | None:
    config = scheduler.config
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler) or config.rescale_betas_zero_snr:
        return None
    count, kind = config.num_train_timesteps, config.beta_schedule
    if config.trained_betas is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    elif kind == "squaredcos_cap_v2":  # arXiv 2102.09672, Eq. 17
        angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2
        level = angle.cos() ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    else:
        return None
    levels = (1 - betas).cumprod(0)
    is_same = torch.allclose(levels, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
    return levels if is_same else None
