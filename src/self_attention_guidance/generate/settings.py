"""What all pictures of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from ..checks import check_count, check_finite, check_text
from ..denoiser.families import config_of, denoiser_of


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings that all pictures of a run share, checked when made.

    Attributes:
        negative_prompt: What to guide away from; has an effect with classifier-free guidance.
        sag_scale: Scale of self-attention guidance; `None` is that of `pipeline.guidance`.
        guidance_scale: Scale of classifier-free guidance; 1 or less is off.
        num_inference_steps: Sampling steps, at least 1.
        width: In pixels, a multiple of 8; `None` is the model's own.
        height: In pixels, a multiple of 8; `None` is the model's own.

    Raises:
        ValueError: A setting is outside its range.
    """

    negative_prompt: str = ""
    sag_scale: float | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        """Checks every setting."""
        check_text("negative_prompt", self.negative_prompt)
        if self.sag_scale is not None:
            check_finite("sag_scale", self.sag_scale)
        check_finite("guidance_scale", self.guidance_scale)
        check_count("num_inference_steps", self.num_inference_steps)
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels is not None and (check_count(name, pixels) % 8):
                raise ValueError(f"{name}={pixels} must be a multiple of 8")


def check_size(pipeline: Any, width: int | None, height: int | None) -> None:
    """Refuses sizes that a model can't draw: without a position at its coarsest level, or patches.

    Args:
        pipeline: The model.
        width: In pixels; `None` is the model's own.
        height: In pixels; `None` is the model's own.

    Raises:
        ValueError: The size is too small, or no multiple of what it must be.
    """
    config: Any = config_of(cast("Any", denoiser_of(pipeline)))
    levels = len(config.get("block_out_channels", ())) or 1
    scale = int(getattr(pipeline, "vae_scale_factor", 1))
    smallest = max(8, scale * 2 ** (levels - 1))
    # Transformers see patches of latents, or latents that are packed two by two.
    multiple = 8 if levels > 1 else max(8, 2 * scale)
    for name, pixels in {"width": width, "height": height}.items():
        if pixels is not None and pixels < smallest:
            raise ValueError(f"{name}={pixels} must be at least {smallest} for this model")
        if pixels is not None and pixels % multiple:
            raise ValueError(f"{name}={pixels} must be a multiple of {multiple} for this model")
