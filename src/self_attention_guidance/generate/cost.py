"""A picture, and what it took."""

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
        seconds: From prompt to picture.
        evaluations: Of the network, each row of a batch counted: two a step under classifier-free
            guidance, one more where it is guided.
    """

    seconds: float
    evaluations: int

    @property
    def time(self) -> str:
        """The seconds, rounded to two digits, or to whole ones."""
        return f"{self.seconds:{'.2g' if self.seconds < 99 else '.0f'}} s"

    def __str__(self) -> str:
        """As the grid has it below a picture."""
        return f"{self.time}, {self.evaluations} evaluations"


def generate_one(
    pipeline: Any, prompt: str, settings: GenerationSettings, *, seed: int, **others: Any
) -> tuple[GeneratedImage, Cost]:
    """Makes one picture, alone, because that is what its time is of.

    Args:
        pipeline: As in `generate`.
        prompt: What to draw.
        settings: All others.
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
