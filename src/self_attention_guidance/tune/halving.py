"""The search itself, from scores to a ranking. It knows neither models nor pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from .plan import Plan

Setting = TypeVar("Setting")
Scores = Callable[[Sequence[Setting], int], Mapping[Setting, float]]
"""Called with settings and a number of seeds; returns scores, lower is better. If time is short,
they may be of fewer seeds, the same number for all. Settings that fail are left out."""

# Number of settings around which neighbours are searched.
_PARENTS = 4
# A setting counts as cheaper if it saves at least this share.
_CHEAPER = 0.1


def search(
    listed: Sequence[Setting],
    plan: Plan,
    scores: Scores[Setting],
    neighbours: Callable[[Sequence[Setting], int], Sequence[Setting]],
) -> list[Setting]:
    """Search by successive halving; neighbours of the first rung's best are tried, too.

    Settings are always compared on the same seeds.

    Args:
        listed: The settings to try first, none twice.
        plan: How many settings each rung keeps.
        scores: Draws and scores settings.
        neighbours: Called with settings and a number; returns at most that many new ones near them.

    Returns:
        The settings of the last rung, the best first.
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

    This is the one-standard-error rule (Breiman et al., Classification and Regression Trees,
    1984, Sec. 3.4.3), on paired differences.

    Args:
        ranked: The best first.
        values: Scores of each, (repetitions + 1,): on all seeds, then on random halves, which are
            the same for all settings.
        costs: Cost of a picture for each, in any unit, above 0.
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
