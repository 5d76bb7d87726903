"""What a visitor may ask for. Nothing that is typed becomes a path or the name of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..checks import check_count, check_finite, check_text
from ..generate import GenerationSettings, check_scales, check_scheduler_name, check_start
from ..guidance import METHODS

MOST_CHARACTERS = 2000
LARGEST_SEED = 2**32 - 1
_LARGEST_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one visitor may ask for at once.

    Attributes:
        max_steps: Sampling steps of a picture.
        max_size: Pixels of a side.
        max_images: Pictures of a grid.
        max_queue: Visitors that wait; more are told to come again.

    Raises:
        ValueError: A limit is not a whole number of at least 1.
    """

    max_steps: int = 100
    max_size: int = 1024
    max_images: int = 24
    max_queue: int = 32

    def __post_init__(self) -> None:
        """Checks every limit."""
        for field in fields(self):
            check_count(field.name, getattr(self, field.name))


@dataclass(frozen=True, kw_only=True)
class VisitorSettings:
    """The controls of the page, as a visitor left them; see `SelfAttentionGuidance`.

    Attributes:
        prompt: What to draw; may be empty.
        negative_prompt: What to guide away from.
        seed: 0 to 2**32 - 1.
        steps: Sampling steps.
        scheduler: A name of `scheduler_names`; an empty text is the model's own.
        guidance_scale: Of classifier-free guidance; 1 or less is off.
        sag_scale: Of self-attention guidance.
        blur_sigma: In pixels of the denoiser's input.
        threshold: Attention received above this is blurred.
        start: First guided part of the steps, 0 to 1.
        stop: End of the guided part.
        every: From one second pass to the next, in steps.
        size: Pixels of a side, a multiple of 8; 0 is the model's own.
        method: Short name of the guidance; an empty text is the model's own.
        layers: What methods that weaken layers weaken, with plus signs between; empty is the
            default.
        image: File of the picture to begin with; `None` begins with noise.
        mask: File of a picture that is white where `image` is drawn anew; `None` draws all of it.
        strength: How much of `image` is changed, above 0, at most 1.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    scheduler: str
    guidance_scale: float
    sag_scale: float
    blur_sigma: float
    threshold: float
    start: float
    stop: float
    every: int
    size: int
    method: str = ""
    layers: str = ""
    image: str | None = None
    mask: str | None = None
    strength: float = 0.8

    def generation(self) -> GenerationSettings:
        """What does not belong to guidance.

        Raises:
            ValueError: A setting is outside its range.
        """
        return GenerationSettings(
            negative_prompt=self.negative_prompt,
            sag_scale=self.sag_scale,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.steps,
            width=self.size or None,
            height=self.size or None,
            image=self.image,
            mask=self.mask,
            strength=self.strength if self.image else None,
        )

    def check(self, limits: Limits) -> None:
        """Refuse what is outside the limits; the guidance checks its own settings.

        Args:
            limits: Of this page.

        Raises:
            ValueError: Names the control, its value and the rule.
        """
        for name in ("prompt", "negative_prompt", "layers"):
            text = check_text(name, getattr(self, name))
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"{name} must have at most {MOST_CHARACTERS} characters")
        _check_most("steps", check_count("steps", self.steps), limits.max_steps)
        _check_most("seed", check_count("seed", self.seed, least=0), LARGEST_SEED)
        for name in ("guidance_scale", "sag_scale"):
            check_scale(name, getattr(self, name))
        if self.size:
            _check_most("size", check_count("size", self.size), limits.max_size)
        if check_text("scheduler", self.scheduler):
            check_scheduler_name(self.scheduler)
        if check_text("method", self.method) and self.method not in METHODS:
            raise ValueError(f"method={self.method!r:.60} must be one of {', '.join(METHODS)}")
        check_start(self.generation(), limits.max_size)


def check_scale(name: str, scale: float) -> float:
    """A guidance scale that is no accident.

    Args:
        name: Of the control.
        scale: Its value.

    Raises:
        ValueError: It is not finite, or beyond 100.
    """
    if abs(check_finite(name, scale)) > _LARGEST_SCALE:
        raise ValueError(f"{name}={scale:g} must be between -100 and 100")
    return scale


def check_grid(
    scales: str, prompts: str, num_seeds: int, limits: Limits
) -> tuple[Sequence[float], list[str]]:
    """The scales and prompts of a grid.

    Args:
        scales: Numbers separated by commas.
        prompts: One a line; empty lines count only if there is nothing else.
        num_seeds: Seeds of each prompt.
        limits: Of this page.

    Raises:
        ValueError: A text does not parse, or the grid has too many pictures.
    """
    try:
        numbers = [float(part) for part in scales.split(",")]
    except ValueError:
        raise ValueError(
            f"scales={scales!r} must be numbers separated by commas, for example 0, 1, 2"
        ) from None
    for number in check_scales(numbers):
        check_scale("scales", number)
    lines = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
    pictures = len(numbers) * len(lines) * check_count("seeds", num_seeds)
    _check_most("pictures", pictures, limits.max_images)
    if any(len(line) > MOST_CHARACTERS for line in lines):
        raise ValueError(f"a prompt must have at most {MOST_CHARACTERS} characters")
    return numbers, lines


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(f"{name}={value} must be at most {most} on this page")
