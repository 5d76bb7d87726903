"""The settings that all pictures of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count, check_finite, check_text, keep_python_numbers


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings that all pictures of a run share, checked when made.

    Attributes:
        negative_prompt: What to guide away from; has an effect with classifier-free guidance.
        sag_scale: Scale of self-attention guidance; `None` is that of `pipeline.guidance`.
        guidance_scale: Scale of classifier-free guidance; 1 or less is off.
        num_inference_steps: Sampling steps, at least 1.
        width: Width in pixels, a multiple of 8; `None` is the model's own.
        height: Height in pixels, a multiple of 8; `None` is the model's own.
        image: Path of the picture that drawing begins with; `None` begins with noise.
        mask: Path of a picture that is white where `image` is redrawn; `None` redraws all of it.
        strength: How much `image` changes, above 0, at most 1: the part of the steps that is
            drawn; `None` is the pipeline's own.

    Raises:
        ValueError: A setting is outside its range.
    """

    negative_prompt: str = ""
    sag_scale: float | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    width: int | None = None
    height: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        keep_python_numbers(self)
        check_text("negative_prompt", self.negative_prompt)
        if self.sag_scale is not None:
            check_finite("sag_scale", self.sag_scale)
        check_finite("guidance_scale", self.guidance_scale)
        check_count("num_inference_steps", self.num_inference_steps)
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels is not None and (check_count(name, pixels) % 8):
                raise ValueError(f"{name}={pixels} must be a multiple of 8")
        for name in ("mask", "strength"):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f"{name}={getattr(self, name)!r} needs image")
        if self.strength is not None and not 0 < check_finite("strength", self.strength) <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if self.strength is not None and self.strength * self.num_inference_steps < 1:
            raise ValueError(
                f"strength={self.strength} of {self.num_inference_steps} steps leaves less than "
                "one: raise it, or take more steps"
            )
