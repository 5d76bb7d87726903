"""The search itself: numbers in, a ranking out. It knows neither models nor pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from .plan import Plan

Setting = TypeVar("Setting")
Scores = Callable[[Sequence[Setting], int], Mapping[Setting, float]]
"""Scores of settings on the first so many seeds, lower is better. They may be of fewer seeds, where
time is short, but of equally many for all; settings that fail are left out."""

# Neighbours are looked for around so many.
_PARENTS = 4
# A setting counts as cheaper if it saves at least this share.
_CHEAPER = 0.1


def search(
    listed: Sequence[Setting],
    plan: Plan,
    scores: Scores[Setting],
    neighbours: Callable[[Sequence[Setting], int], Sequence[Setting]],
) -> list[Setting]:
    """Successive halving, with neighbours of the first rung's best as further settings.

    Settings are compared with each other on equally many seeds, the same ones.

    Args:
        listed: What is tried first, no setting twice.
        plan: How many settings each rung keeps.
        scores: Draws and scores settings.
        neighbours: So many settings near the given ones, or fewer, none of those listed.

    Returns:
        What the last rung was drawn for, the best first.
    """
    first = plan.rungs[0]
    ranked = _ranked(scores(listed, first.seeds))
    more = neighbours(ranked[:_PARENTS], plan.neighbours) if plan.neighbours else ()
    if more:
        ranked = _ranked(scores([*ranked, *more], first.seeds))
    for rung in plan.rungs[1:]:
        ranked = _ranked(scores(ranked[: rung.settings], rung.seeds))
    return ranked


def _ranked(found: Mapping[Setting, float]) -> list[Setting]:
    # Sorting keeps the order of the list among equals.
    return sorted(found, key=lambda setting: found[setting])


def prefer_cheaper(
    ranked: Sequence[Setting], values: Mapping[Setting, Tensor], costs: Mapping[Setting, float]
) -> Setting:
    """The best setting, or the cheapest that is within a standard error of it.

    That is the rule of one standard error (Breiman et al., Classification and Regression Trees,
    1984, Sec. 3.4.3), on paired differences.

    Args:
        ranked: The best first.
        values: Scores of each, (repetitions + 1,): on all seeds, then on random halves, the same
            ones for all.
        costs: Of a picture, in any unit, above 0.
    """
    best = ranked[0]

    def is_as_good(setting: Setting) -> bool:
        difference = values[setting] - values[best]
        if len(difference) < 3:
            return False
        return bool(difference[0] <= difference[1:].std())

    cheaper = [
        setting
        for setting in ranked[1:]
        if costs[setting] <= (1 - _CHEAPER) * costs[best] and is_as_good(setting)
    ]
    return min(cheaper, key=lambda setting: costs[setting], default=best)
