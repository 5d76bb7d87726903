"""A picture and its cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..denoiser.families import denoiser_of
from .counting import counted_rows
from .drawing import GeneratedImage
from .sampling import generate
from .settings import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a picture.

    Attributes:
        seconds: Time from prompt to picture.
        evaluations: Network evaluations, counted for each row of a batch: two a step with
            classifier-free guidance, and one more in guided steps. That one counts as one even if a
            method computes only a part of it.
    """

    seconds: float
    evaluations: int

    @property
    def time(self) -> str:
        """The seconds, rounded to two digits, or to whole ones."""
        return f"{self.seconds:{'.2g' if self.seconds < 99 else '.0f'}} s"

    def __str__(self) -> str:
        """The text below a picture in a grid."""
        return f"{self.time}, {self.evaluations} evaluations"


def generate_one(
    pipeline: Any, prompt: str, settings: GenerationSettings, *, seed: int, **others: Any
) -> tuple[GeneratedImage, Cost]:
    """Make one picture, not in a batch, so that the time is its own.

    Args:
        pipeline: As in `generate`.
        prompt: What to draw.
        settings: All other settings.
        seed: Its seed.
        **others: Further arguments of `generate`.

    Raises:
        ValueError: An argument is outside its range.
        FloatingPointError: A prediction is NaN or infinite.
    """
    started = time.perf_counter()
    with counted_rows(denoiser_of(pipeline)) as rows:
        (picture,) = generate(pipeline, prompt, settings, seed=seed, **others)
    return picture, Cost(seconds=time.perf_counter() - started, evaluations=sum(rows))
