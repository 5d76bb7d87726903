"""Self-Attention Guidance and blur guidance: Hong et al., ICCV 2023, arXiv 2210.00939.

Algorithm 1 of the paper, for one step. The lines marked `weaken` are here; the others are the same
for every guidance, and in `guided_call`:

    eps, A     <- the network at x_t, and the self-attention of one layer
    x0         <- the clean sample that eps predicts
    M          <- A > psi, where A is what each position receives                (weaken)
    x0'        <- M * blur(x0) + (1 - M) * x0                                    (weaken)
    x_t'       <- x0' with the noise eps added again
    eps'       <- the network at x_t'
    eps        <- eps + s * (eps - eps'), for the sampler's step
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from ..checks import check_count, check_layer, check_number
from .base import Guidance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .step import Step

LARGEST_KERNEL = 4095
"""Most taps of a blur, wider than any picture: a Gaussian has its weight within six sigma, and
borders are mirrored. The blur takes memory in proportion to it."""


@dataclass(frozen=True)
class Blurring(Guidance):
    """Settings of guidances that blur the clean sample (see `SelfAttentionGuidance`)."""

    scale: float = 0.75
    _: KW_ONLY
    blur_sigma: float = 1.0
    blur_kernel_size: int = 9

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_number("blur_sigma", self.blur_sigma, 0, math.inf)
        size = check_count("blur_kernel_size", self.blur_kernel_size, most=LARGEST_KERNEL)
        if size % 2 == 0:
            raise ValueError(f"blur_kernel_size={size} must be odd")


@dataclass(frozen=True)
class BlurGuidance(Blurring, method="blur"):
    """Guidance away from the prediction at a clean sample that is blurred everywhere.

    It reads no attention, so it also guides networks that have none. Its settings are those of
    `Guidance`, plus `blur_sigma` and `blur_kernel_size` of `SelfAttentionGuidance`.
    """

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Blur the predicted clean sample."""
        import torch

        from ..maths import gaussian_blur

        step.noted["mask"] = torch.ones_like(step.x0[:, 0], dtype=torch.bool)
        yield gaussian_blur(step.x0, self.blur_sigma, self.blur_kernel_size)


@dataclass(frozen=True)
class SelfAttentionGuidance(Blurring, method="sag"):
    """Settings of Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939).

    Attributes:
        scale: The paper's s (Eq. 16), any finite number: 0 is off, 0.5 to 0.75 is usual, negative
            values make samples worse on purpose.
        blur_sigma: Standard deviation of the blur, in pixels of the denoiser's input (latent
            pixels for latent diffusion), at least 0.
        blur_kernel_size: Taps of the blur, odd, 1 to 4095.
        branch: "uncond" is the paper's choice; "cond" changes the subject more.
        threshold: Positions that receive more attention than this are blurred; 1.0 is the mean.
        layer: Dotted path of the self-attention layer in the denoiser, or a beginning of it that
            matches no other layer, such as "down.0". `None` is the default of the denoiser's
            family: the mid block of U-Nets, the middle block of DiT (by argument, not by
            measurement: it corresponds to the bottleneck of a U-Net).
    """

    _: KW_ONLY
    threshold: float = 1.0
    layer: str | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_number("threshold", self.threshold, 0, math.inf)
        check_layer("layer", self.layer)

    def reads(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Dotted path of the layer whose attention makes the mask."""
        from ..denoiser.families import default_layer
        from ..denoiser.layers import resolved

        if self.layer is None:
            return (default_layer(denoiser),)
        found = resolved(denoiser, (self.layer,), has_blocks=False)
        if len(found) > 1:
            raise ValueError(f"layer={self.layer!r} means {' and '.join(found)}: name one of them")
        return found

    def mask(self, attention: Tensor) -> Tensor:
        """Positions to blur, bool, of the shape of `attention`, which has mean 1 (Eq. 14)."""
        return attention > self.threshold

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Blur the predicted clean sample where the network attends to it (Eq. 14 and 15)."""
        from ..maths import degrade

        (attention,) = step.attention.values()
        mask = self.mask(attention)
        step.noted.update(attention=attention, mask=mask)
        yield degrade(step.x0, mask, self.blur_sigma, self.blur_kernel_size)
