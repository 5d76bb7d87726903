"""Blur guidance, the form of Hong et al., ICCV 2023, arXiv 2210.00939, Sec. 4.1."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..maths import gaussian_blur
from .base import Guidance, Step


@dataclass(frozen=True)
class Blurring(Guidance):
    """Settings of guidances that blur the clean sample, beside those of `Guidance`.

    Attributes:
        blur_sigma: Standard deviation of the blur, in pixels of the denoiser's input (latent
            pixels for latent diffusion), at least 0.
        blur_kernel_size: Taps of the blur, odd, at least 1.
    """

    scale: float = 0.75
    _: KW_ONLY
    blur_sigma: float = 1.0
    blur_kernel_size: int = 9

    def __post_init__(self) -> None:
        """Check every setting once, here."""
        super().__post_init__()
        check_number("blur_sigma", self.blur_sigma, 0, math.inf)
        if check_count("blur_kernel_size", self.blur_kernel_size) % 2 == 0:
            raise ValueError(f"blur_kernel_size={self.blur_kernel_size} must be odd")


@dataclass(frozen=True)
class BlurGuidance(Blurring, method="blur"):
    """Guidance away from a prediction at a clean sample that is blurred everywhere.

    It reads no attention, so it also guides networks that have none. Its settings are those of
    `Guidance`, and `blur_sigma` and `blur_kernel_size` of `SelfAttentionGuidance`.
    """

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Blur the predicted clean sample."""
        step.noted["mask"] = torch.ones_like(step.x0[:, 0], dtype=torch.bool)
        yield gaussian_blur(step.x0, self.blur_sigma, self.blur_kernel_size)
