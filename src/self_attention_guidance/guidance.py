"""The settings of guidance, and what they can be attached to."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .checks import check_count, check_finite
from .families import FAMILIES, BatchLayout, default_layer, family_of
from .handle import GuidanceHandle
from .maths import attention_mask
from .prediction import check_scheduler
from .target import Target

Branch = Literal["uncond", "cond"]

# Pipelines of U-Nets whose first channels are not, or not only, what is denoised.
_OTHER_INPUTS = ("Marigold", "IFSuperResolution", "IFImg2ImgSuper", "IFInpaintingSuper")


@dataclass(frozen=True)
class _Guidance:
    """What all forms of guidance have in common: a blur, when, whose, and how much."""

    scale: float = 0.75
    _: KW_ONLY
    blur_sigma: float = 1.0
    blur_kernel_size: int = 9
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    branch: Branch = "uncond"

    def __post_init__(self) -> None:
        """Check every setting once, here."""
        _check_number("scale", self.scale, -math.inf, math.inf)
        _check_number("blur_sigma", self.blur_sigma, 0, math.inf)
        _check_number("start", self.start, 0, 1)
        _check_number("stop", self.stop, 0, 1)
        check_count("every", self.every)
        if check_count("blur_kernel_size", self.blur_kernel_size) % 2 == 0:
            raise ValueError(f"blur_kernel_size={self.blur_kernel_size} must be odd")
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} must be below stop={self.stop}")
        if self.branch not in get_args(Branch):
            raise ValueError(f"branch={self.branch!r} must be 'uncond' or 'cond'")

    def attention_layer(self, denoiser: nn.Module) -> str | None:
        """Dotted path of the layer whose attention is read; `None` reads none."""
        raise NotImplementedError

    def mask(self, attention: Tensor) -> Tensor:
        """The positions to blur, given the attention that each receives."""
        raise NotImplementedError

    def attach(
        self,
        target: Any,
        *,
        scheduler: Any = None,
        batch_layout: BatchLayout | None = None,
    ) -> GuidanceHandle:
        """Guide every call of a denoiser until the handle is removed.

        Args:
            target: A diffusers pipeline, or a denoiser for a loop of your own.
            scheduler: The scheduler that drives a bare denoiser. A pipeline's own is used, also
                when it is exchanged later.
            batch_layout: What a call holds under classifier-free guidance: a batch of two halves
                in this order, "uncond_first" or "cond_first", or the first of two calls of a
                step, "cond_call_first"; "single" without it (each row is an image). `None` asks
                the pipeline at every step; for a bare denoiser it is "single".

        Returns:
            The handle; use it in a `with` statement, or call its `remove`.

        Raises:
            ValueError: The denoiser, its layer or the scheduler is not supported, or the
                denoiser is guided already.
        """
        return self._attached(_target(target, scheduler, batch_layout))

    def attach_to_call(self, pipeline: Any) -> GuidanceHandle:
        """As `attach`, for a call of a pipeline that runs: other threads are refused.

        Args:
            pipeline: A diffusers pipeline.

        Raises:
            ValueError: As in `attach`.
        """
        return self._attached(_target(pipeline, None, None), is_for_this_thread=True)

    def _attached(self, target: Target, is_for_this_thread: bool = False) -> GuidanceHandle:
        check_scheduler(target.scheduler)
        return GuidanceHandle(self, target, is_for_this_thread)


@dataclass(frozen=True)
class SelfAttentionGuidance(_Guidance):
    """Settings of Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939).

    Attributes:
        scale: The paper's s (Eq. 16), any finite number: 0 is off, 0.5 to 1 is usual, negative
            values make samples worse on purpose.
        blur_sigma: Standard deviation of the blur, in pixels of the denoiser's input (latent
            pixels for latent diffusion), at least 0.
        blur_kernel_size: Taps of the blur, odd, at least 1.
        start: Guidance begins at this fraction of the scheduler's timesteps, 0 to 1.
        stop: Guidance ends at this fraction, above `start`, at most 1. Image-to-image runs enter
            the scheduler's timesteps part-way.
        every: A second pass runs at every n-th guided timestep, at least 1; those between add its
            term again, and cost nothing.
        branch: Whose attention and second pass are used under classifier-free guidance:
            "uncond" is the paper's, "cond" acts more on the subject.
        threshold: Positions that receive more attention than this are blurred; 1.0 is the mean.
        layer: Dotted path of the self-attention layer in the denoiser; `None` is the default of
            the denoiser's family: the mid block of U-Nets, the middle block of DiT (by argument,
            not by measurement: it is to DiT's blocks what the bottleneck is to a U-Net's).

    Raises:
        ValueError: A setting is out of its range or not of its type.
    """

    _: KW_ONLY
    threshold: float = 1.0
    layer: str | None = None

    def __post_init__(self) -> None:
        """Check every setting once, here."""
        super().__post_init__()
        _check_number("threshold", self.threshold, 0, math.inf)
        _check_layer(self.layer)

    @classmethod
    def fast(cls, scale: float = 1.0, **settings: Any) -> SelfAttentionGuidance:
        """Guidance that costs a sixth of what it costs at every step.

        Only the steps from a fifth to two thirds of the way are guided, and a second pass runs at
        every third of them: the term is small before, draws speckles after, and changes slowly.

        Args:
            scale: A third more than at every step makes up for the steps that are left out.
            **settings: Any others.

        Raises:
            ValueError: A setting is out of its range or not of its type.
        """
        preset: dict[str, Any] = {"start": 0.2, "stop": 0.65, "every": 3}
        return cls(scale, **{**preset, **settings})

    def attention_layer(self, denoiser: nn.Module) -> str:
        """Dotted path of the layer whose attention is read."""
        return self.layer or default_layer(denoiser)

    def mask(self, attention: Tensor) -> Tensor:
        """The positions to blur, bool; `attention` is what each receives, mean 1, same shape."""
        return attention_mask(attention, self.threshold)


@dataclass(frozen=True)
class BlurGuidance(_Guidance):
    """Settings of blur guidance, the form of Sec. 4.1 that blurs everywhere and reads no attention.

    It attaches like `SelfAttentionGuidance` (Hong et al., ICCV 2023, arXiv 2210.00939), which is
    this with a mask, and needs no self-attention layer in the denoiser.

    Attributes:
        scale: Weight of the guidance, any finite number; 0 is off.
        blur_sigma: Standard deviation of the blur, in pixels of the denoiser's input (latent
            pixels for latent diffusion), at least 0.
        blur_kernel_size: Taps of the blur, odd, at least 1.
        start: Guidance begins at this fraction of the scheduler's timesteps, 0 to 1.
        stop: Guidance ends at this fraction, above `start`, at most 1.
        every: A second pass runs at every n-th guided timestep, at least 1.
        branch: Whose second pass is used under classifier-free guidance, "uncond" or "cond".

    Raises:
        ValueError: A setting is out of its range or not of its type.
    """

    def attention_layer(self, denoiser: nn.Module) -> None:
        """None is read."""
        return

    def mask(self, attention: Tensor) -> Tensor:
        """Every position, bool, of the shape of `attention`."""
        return torch.ones_like(attention, dtype=torch.bool)


def _check_layer(value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"layer={value!r} must be a dotted module path, or None")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not low <= check_finite(name, value) <= high:
        limits = f"from {low} to {high}" if high < math.inf else f"at least {low}"
        raise ValueError(f"{name}={value!r} must be {limits}")


def _target(target: Any, scheduler: Any, batch_layout: BatchLayout | None) -> Target:
    if batch_layout is not None and batch_layout not in get_args(BatchLayout):
        raise ValueError(
            f"batch_layout={batch_layout!r} must be one of {', '.join(get_args(BatchLayout))}"
        )
    if isinstance(target, nn.Module):
        if scheduler is None:
            raise ValueError("scheduler=None must be the scheduler that drives this denoiser")
        return Target(target, family_of(target), scheduler, None, batch_layout or "single")
    denoiser = getattr(target, "unet", getattr(target, "transformer", None))
    if not isinstance(denoiser, nn.Module):
        raise ValueError(
            f"target={type(target).__name__} must be a diffusers pipeline with a unet or a "
            f"transformer, or a denoiser; supported denoisers: {', '.join(FAMILIES)}"
        )
    if scheduler is not None:
        raise ValueError("scheduler must not be given with a pipeline: its own is used")
    if any(base.__name__.startswith(_OTHER_INPUTS) for base in type(target).__mro__):
        raise ValueError(
            f"{type(target).__name__} is not supported: its network receives what is denoised "
            "behind other channels, or returns more of them"
        )
    family = family_of(denoiser)
    return Target(denoiser, family, None, target, batch_layout)
