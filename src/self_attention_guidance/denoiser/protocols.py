"""What is used of diffusers' schedulers and denoisers, which share no type that says so."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Config(Protocol):
    """The settings of a scheduler or of a denoiser."""

    def get(self, name: str, default: Any = None, /) -> Any:
        """A setting, or `default` if there is none of that name."""


class Scheduler(Protocol):
    """A scheduler whose timesteps are set.

    Its noise levels are in `sigmas` and counted by `step_index`, or in `alphas_cumprod`.
    """

    config: Config
    timesteps: Tensor


def config_of(denoiser: nn.Module) -> Config:
    """The config of a denoiser; an empty one if it has none."""
    config: Config = getattr(uncompiled(denoiser), "config", {})  # type: ignore[assignment]
    return config


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """The module behind `torch.compile(denoiser)`, or the denoiser itself."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return inner if isinstance(inner, nn.Module) else denoiser
