"""Intervals that say how far an estimate would change with other samples, from random halves.

The usual bootstrap draws with replacement, so a set can hold a picture twice. This biases figures
that use pairs of pictures: a copy is its original's nearest neighbour. So each repetition takes a
random half of the samples without replacement instead. The spread of an estimate over halves is its
standard error on the whole set (Shao and Wu 1989, the delete-half jackknife). Estimates on halves
are biased like those of small sets, so the interval uses their deviations from their own mean,
around the estimate of the whole set. The reference is taken as given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: The figure on all samples.
        low: Lower end of the interval; `None` without repetitions.
        high: Upper end, likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None


def random_halves(count: int, repetitions: int, seed: int) -> Tensor:
    """Random halves of a set, the same for the same arguments.

    Args:
        count: Number of rows of the set.
        repetitions: Number of halves; 0 for none.
        seed: Seed, at least 0.

    Returns:
        (repetitions + 1, count) bool; the first row is the whole set.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = torch.zeros(repetitions + 1, count, dtype=torch.bool)
    halves[0] = True
    for half in halves[1:]:
        half[torch.randperm(count, generator=generator)[: count // 2]] = True
    return halves


def estimate(values: Tensor, least: float, most: float = float("inf")) -> Estimate:
    """An estimate from the values on the whole set and on its halves.

    Args:
        values: (repetitions + 1,), the first on the whole set.
        least: Smallest possible value of the figure, which bounds the interval.
        most: Largest possible value.
    """
    value = float(values[0])
    if len(values) < 3:  # one repetition has no spread
        return Estimate(value)
    tail = (1 - CONFIDENCE) / 2
    points = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    deviations = values[1:].double() - values[1:].double().mean()
    low, high = (value + deviations.quantile(points)).clamp(least, most).tolist()
    # A value at the end of its range may be beyond all others; the interval must still hold it.
    return Estimate(value, min(low, value), max(high, value))


def paired_difference(values: Tensor, others: Tensor) -> Estimate:
    """How much larger a figure is for one set than for another with the same seeds.

    What the sets share affects both, so the interval is narrower than those of the two figures.

    Args:
        values: (repetitions + 1,), the first on the whole set, the others on its halves.
        others: Values of the other set on the same halves; sample i has the same seed in both.

    Raises:
        ValueError: They are not of as many parts.
    """
    if values.shape != others.shape:
        raise ValueError(f"values of {len(values)} and {len(others)} parts can't be paired")
    return estimate(values - others, least=-float("inf"))
