"""Runs that take turns, and the ratios of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Advance = Callable[[float], object]


@dataclass(frozen=True)
class Spread:
    """Where the values of several rounds lie.

    Attributes:
        median: Half of them are below.
        low: The lowest.
        lower_quartile: A quarter of them are below.
        upper_quartile: A quarter of them are above.
        high: The highest.
    """

    median: float
    low: float
    lower_quartile: float
    upper_quartile: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and range.

    Args:
        values: One or more.
    """
    several = values if len(values) > 1 else [*values, *values]
    lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
    return Spread(median, min(values), lower, upper, max(values))


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The spread of quotients within rounds, in which both ran under the same load.

    Args:
        over: A value of each round.
        under: Likewise.
    """
    return spread([a / b for a, b in zip(over, under, strict=True)])


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: rotated from round to round, and every second one reversed.

    So none always runs first, or always behind the same one.

    Args:
        names: What runs.
        number: Of the round, from 0.
    """
    turn = number // 2 % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated[::-1] if number % 2 else rotated


def time_rounds(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    advance: Advance = lambda share: None,
) -> dict[str, list[float]]:
    """Lets all run once in every round.

    Args:
        runs: What is timed, by name.
        rounds: How many, at least 1.
        device: Where the work is done; the clock waits for it.
        advance: Takes the share of a round that was done since it was last called.

    Returns:
        Seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in order(list(runs), number):
            seconds[name].append(_seconds(runs[name], device))
            advance(1 / len(runs))
    return seconds


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
