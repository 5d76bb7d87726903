"""Scores that rank settings: a distance to a reference, or without one, how pictures change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..evaluate import LoadedSet, random_halves
from ..evaluate.statistics import frechet_distances, moments_of

FIGURES = ("saturation", "clipped", "contrast", "sharpness")
"""What is measured for each picture: see `figures_of`."""

# A picture that moved by this share of the distance between pictures of different seeds is visibly
# changed, and still the same picture.
_MOVED = 0.3
# A covariance of a half needs two pictures.
_FEWEST_FOR_HALVES = 4


@dataclass(frozen=True)
class Drawn:
    """The results of the pictures of a setting, in the order of their seeds.

    Attributes:
        features: (pictures, features) float32.
        figures: (pictures, len(FIGURES)) float64.
        evaluations: Network evaluations for a picture.
        seconds: Time for a picture, scoring included.
    """

    features: Tensor
    figures: Tensor
    evaluations: float
    seconds: float


class Score(Protocol):
    """A score that ranks settings; lower is better.

    Attributes:
        title: Title in reports.
        least: The smallest possible value.
        advice: Sentences about what the score shows and what it cannot show.
    """

    title: ClassVar[str]
    least: ClassVar[float]
    advice: ClassVar[str]

    def values(self, drawn: Drawn, unguided: Drawn, halves: Tensor) -> Tensor:
        """Scores of a setting on each of the given parts of its pictures.

        Args:
            drawn: Pictures of the setting.
            unguided: Pictures of the same seeds without guidance.
            halves: (repetitions, pictures) bool, as `halves_of` returns them.

        Returns:
            (repetitions,) float64.
        """
        ...


class FrechetScore:
    """Fréchet distance to a reference."""

    title: ClassVar[str] = "Fréchet distance"
    least: ClassVar[float] = 0.0
    advice: ClassVar[str] = (
        "The score is the Fréchet distance to the reference; lower is better. With few pictures it"
        " is too large, by an amount that depends on their number. So compare these figures only"
        " with each other, and never with distances of other numbers of pictures. The score says"
        " how alike the two sets are as a whole, in the encoder's features. It does not say"
        " whether a single picture is good or fits its prompt."
    )

    def __init__(self, reference: LoadedSet) -> None:
        """Store the reference; compute nothing yet.

        Args:
            reference: A set whose features are from the same encoder as the pictures'.
        """
        self._reference = reference

    def values(self, drawn: Drawn, unguided: Drawn, halves: Tensor) -> Tensor:
        """Scores as in `Score`.

        Raises:
            ValueError: The reference holds other features.
        """
        own, other = drawn.features.shape[1], len(self._reference.moments.mean)
        if own != other:
            raise ValueError(f"reference: it holds {other} features a picture, not {own}")
        moments = moments_of(drawn.features)
        return frechet_distances(drawn.features, moments, self._reference.moments, halves)


class ChangeScore:
    """How gently pictures are changed: a rule for a careful choice, not a measure of quality."""

    title: ClassVar[str] = "change score"
    least: ClassVar[float] = 0.0
    advice: ClassVar[str] = (
        "Without a reference, no figure can say that pictures are better. The score only"
        " sorts out settings that do nothing and settings that do harm. It is 0 for"
        f" pictures that moved by {_MOVED:g} of the distance between pictures of different seeds,"
        " in the encoder's features, while saturation, share of clipped values, contrast and"
        " sharpness stayed as they are without guidance. It is 1 without guidance. It can't tell"
        " whether shapes are better, whether details are right, or whether pictures fit their"
        " prompts. The file holds the setting with the best score because it must hold one: look at"
        " the grid, and choose."
    )

    def values(self, drawn: Drawn, unguided: Drawn, halves: Tensor) -> Tensor:
        """Scores as in `Score`."""
        spread = unguided.figures.std(0).clamp(min=1e-6)
        change = (mean_over(halves, drawn.figures - unguided.figures) / spread).abs().mean(1)
        moved = mean_over(halves, moved_by(drawn, unguided)[:, None])[:, 0]
        return change + (moved - _MOVED).abs() / _MOVED


def moved_by(drawn: Drawn, unguided: Drawn) -> Tensor:
    """How far each picture is from the one without guidance.

    Args:
        drawn: Pictures of a setting.
        unguided: Pictures of the same seeds without guidance.

    Returns:
        (pictures,) float64: 0 is the same features, 1 as far as pictures of different seeds are
        from each other.
    """
    own = unguided.features.double()
    apart = (own - own.roll(1, 0)).norm(dim=1).mean().clamp(min=1e-9)
    return (drawn.features.double() - own).norm(dim=1) / apart


def figures_of(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Figures of each picture that need no reference.

    - saturation: mean difference of the largest and the smallest colour value of a pixel, 0 to 1;
    - clipped: share of values that are black or full, 0 to 1;
    - contrast: standard deviation of the brightness, 0 to 0.5;
    - sharpness: mean difference of brightness between neighbours, 0 to 1.

    Args:
        pictures: (pictures, height, width, 3).

    Returns:
        (pictures, len(FIGURES)).
    """
    values = pictures.astype(np.float64) / 255
    brightness = values.mean(-1)
    steps = [np.abs(np.diff(brightness, axis=axis)).mean((1, 2)) for axis in (1, 2)]
    return np.stack(
        [
            (values.max(-1) - values.min(-1)).mean((1, 2)),
            ((pictures == 0) | (pictures == 255)).mean((1, 2, 3)),
            brightness.std((1, 2)),
            (steps[0] + steps[1]) / 2,
        ],
        axis=1,
    )


def halves_of(count: int, repetitions: int, seed: int) -> Tensor:
    """Random halves for the interval of a score; none if there are too few pictures.

    Args:
        count: Number of pictures, at least 2.
        repetitions: Number of halves.
        seed: Seed of the halves, at least 0.

    Returns:
        (repetitions + 1, count) bool; the first row is all of them.
    """
    return random_halves(count, repetitions if count >= _FEWEST_FOR_HALVES else 0, seed)


def mean_over(halves: Tensor, rows: Tensor) -> Tensor:
    """Means of rows over each half.

    Args:
        halves: (repetitions, n) bool.
        rows: (n, columns) float64.

    Returns:
        (repetitions, columns) float64.
    """
    weights = halves.to(torch.float64)
    return (weights @ rows) / weights.sum(1, keepdim=True)
