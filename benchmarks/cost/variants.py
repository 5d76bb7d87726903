"""The ways to draw the same picture that are compared."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor

from known_networks import Network, exact_guidance, fast_guidance
from plan import Configuration
from self_attention_guidance.denoiser.families import uncompiled
from self_attention_guidance.guidance import METHODS, Guidance

VARIANTS = {
    "none": "no guidance",
    "exact": "exact",
    "fast": "fast",
    "diffusers": "diffusers' class",
}
"""What each variant is called in tables."""

_SEED = 0
# diffusers' class for a method, and what it needs to know of the layers that are the default here.
_THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "sag": ("StableDiffusionSAGPipeline", {}),
    "pag": ("StableDiffusionPAGPipeline", {"pag_applied_layers": "mid"}),
}


class Unsuitable(ValueError):
    """A variant can't draw with a network; the message says why."""


def check_theirs(network: Network, method: str) -> None:
    """Refuse what diffusers has no class for.

    Args:
        network: Whose pictures are drawn.
        method: Short name of the guidance.

    Raises:
        Unsuitable: There is none for the method, or for the network.
    """
    if method not in _THEIRS:
        raise Unsuitable(f"there is none for {method}")
    if not network.suits_diffusers:
        raise Unsuitable("it is for Stable Diffusion 1 and 2")


class Subject:
    """A network under one configuration, drawn from by every variant on the same weights.

    Attributes:
        network: Whose pictures are drawn.
        configuration: How.
        guidance: The settings of the variants that have some.
    """

    def __init__(self, network: Network, configuration: Configuration, pipeline: Any) -> None:
        """Get everything ready that is not part of a picture's time.

        Args:
            network: What `pipeline` was made of.
            configuration: What is measured.
            pipeline: On its device; compiled here if the configuration says so.
        """
        self.network = network
        self.configuration = configuration
        self.guidance = {
            "exact": exact_guidance(network.folder, configuration.method),
            "fast": fast_guidance(network.folder, configuration.method),
        }
        self._pipeline = pipeline
        self._theirs: Any = None
        self._arguments = network.inputs(configuration) | {
            "num_inference_steps": configuration.steps,
            "output_type": "latent",
        }
        if network.cfg_scale is not None:
            self._arguments["guidance_scale"] = network.cfg_scale if configuration.cfg else 1.0
        self.compile()

    @property
    def denoiser(self) -> Any:
        """The module that all variants call."""
        return self._pipeline.unet

    def compile(self) -> None:
        """Compile the denoiser if the configuration says so, and forget what was compiled."""
        if self.configuration.mode == "compiled":
            torch.compiler.reset()
            self._pipeline.unet = torch.compile(uncompiled(self._pipeline.unet))
            self._theirs = None

    def draw(self, variant: str) -> Tensor:
        """Draw pictures, always the same.

        Args:
            variant: A key of `VARIANTS`.

        Returns:
            Latents, (pictures, channels, rows, columns).

        Raises:
            Unsuitable: diffusers has no class for the method, or it can't draw with this network.
        """
        if variant == "diffusers":
            return self.draw_theirs()
        if variant == "none":
            return self._draw(self._pipeline, sag_scale=0.0)
        return self.draw_ours(self.guidance[variant])

    def draw_ours(self, guidance: Guidance) -> Tensor:
        """Draw with settings of your own.

        Args:
            guidance: The settings.

        Returns:
            Latents, (pictures, channels, rows, columns).
        """
        self._pipeline.guidance = guidance
        return self._draw(self._pipeline, sag_scale=guidance.scale)

    def draw_theirs(self) -> Tensor:
        """Draw with diffusers' class at the scale of the exact variant.

        Returns:
            Latents, (pictures, channels, rows, columns).

        Raises:
            Unsuitable: There is none for the method, or it can't draw with this network.
        """
        method = self.configuration.method
        check_theirs(self.network, method)
        scale = {f"{method}_scale": self.guidance["exact"].scale}
        with _processors_restored(uncompiled(self.denoiser)):
            try:
                return self._draw(self._their_pipeline(), **scale)
            except Exception as error:  # their code, which is not ours to keep from failing
                raise Unsuitable(f"{type(error).__name__}: {error}") from error

    def _their_pipeline(self) -> Any:
        if self._theirs is None:
            name, layers = _THEIRS[self.configuration.method]
            make = getattr(diffusers, name)
            self._theirs = make(
                **self._pipeline.components, **layers, requires_safety_checker=False
            )
            self._theirs.set_progress_bar_config(disable=True)
        return self._theirs

    def _draw(self, pipeline: Any, **scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        return pipeline(**self._arguments, **scale, generator=generator).images


@contextmanager
def _processors_restored(denoiser: Any) -> Generator[None]:
    """Undo what diffusers' class leaves behind in a network when it fails."""
    before = denoiser.attn_processors
    try:
        yield
    except Exception:
        denoiser.set_attn_processor(before)
        raise


def difference_to_diffusers(subject: Subject) -> float:
    """How far our latents are from those of diffusers' class, at the settings that it has fixed.

    Args:
        subject: One that diffusers' class can draw.

    Returns:
        The largest absolute difference, divided by the largest absolute value of theirs.

    Raises:
        Unsuitable: It can't.
    """
    theirs = subject.draw_theirs().float()
    usual = METHODS[subject.configuration.method](subject.guidance["exact"].scale)
    ours = subject.draw_ours(usual).float()
    return float((ours - theirs).abs().max() / theirs.abs().max())
