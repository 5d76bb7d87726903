"""The number of settings and of seeds for a budget, by successive halving.

The first rung draws many settings on few seeds. Each further rung keeps the better half and draws
them on as many seeds again. The settings that remain are drawn on seeds that were not used before.
See Jamieson and Talwalkar, arXiv 1502.07943.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checks import check_count

BEST = 5
"""Number of settings in a report, besides no guidance and the model's own."""

MOST_SHOWN = 8
"""Largest number of pictures of each setting in the grid of a report."""

_UNITS = {"s": 1, "m": 60, "h": 3600}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)", re.IGNORECASE)
# Distances of fewer pictures say hardly anything, and intervals come from halves of them.
_FEWEST_SEEDS = 8
_FIRST_SEEDS = 16
# Of a half, unless a larger number is asked for.
MOST_SEEDS = 2048
_LARGEST_COUNT = 100_000
# Of pictures, or of seconds, which are eleven days.
LARGEST_BUDGET = 1_000_000
# Beyond this many seeds, a larger budget also buys more settings.
_MANY_SEEDS = 64
# The last rung has at least this many settings, so that a person can choose.
_FINALISTS = BEST + 1


@dataclass(frozen=True)
class Budget:
    """The limit of a run; one of the two is `None`.

    Attributes:
        seconds: Time for drawing and scoring, above 0.
        pictures: Number of pictures, at least 1.
    """

    seconds: float | None = None
    pictures: int | None = None


def parse_budget(text: str) -> Budget:
    """Read a budget like "30m", "2h", "90s" or "500".

    Args:
        text: A time with its unit, or a number of pictures.

    Raises:
        ValueError: It has another format, is 0, or is more than anyone can wait for.
    """
    match = _BUDGET.fullmatch(text.strip())
    number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if not number or (not unit and not number.is_integer()):
        raise ValueError(
            f"budget={text!r} must be a time like 90s, 30m or 2h, or a number of pictures like 500"
        )
    if number * _UNITS.get(unit, 1) > LARGEST_BUDGET:
        raise ValueError(
            f"budget={text!r:.40} must be at most {LARGEST_BUDGET:,} pictures or seconds"
        )
    return Budget(seconds=number * _UNITS[unit]) if unit else Budget(pictures=int(number))


@dataclass(frozen=True)
class Rung:
    """A stage of the search.

    Attributes:
        settings: Number of settings.
        seeds: Number of seeds, including those of earlier rungs.
    """

    settings: int
    seeds: int

    def __str__(self) -> str:
        """A text like "24 on 16"."""
        return f"{self.settings} on {self.seeds}"


@dataclass(frozen=True)
class Plan:
    """What a run draws.

    Attributes:
        neighbours: Number of settings in the first rung that are near the best of the others.
        rungs: From many settings on few seeds to few settings on many.
        reported: Largest number of settings to draw on the other half of the seeds.
    """

    neighbours: int
    rungs: tuple[Rung, ...]
    reported: int = BEST + 2

    @property
    def seeds(self) -> int:
        """Number of seeds in each half."""
        return self.rungs[-1].seeds

    @property
    def pictures(self) -> int:
        """Largest number of pictures in total."""
        return sum(self._of_rungs()) + self.reported * self.seeds

    def share(self, seeds: int) -> float:
        """The share of the pictures that is drawn when a rung ends.

        Args:
            seeds: Seeds of the rung.
        """
        ends = [number for number, rung in enumerate(self.rungs) if rung.seeds <= seeds]
        return sum(self._of_rungs()[: len(ends)]) / self.pictures

    def _of_rungs(self) -> list[int]:
        """Number of pictures for each rung; each includes no guidance, for comparison."""
        before = [0, *(rung.seeds for rung in self.rungs)]
        return [
            (rung.settings + (number > 0)) * (rung.seeds - before[number])
            for number, rung in enumerate(self.rungs)
        ]

    def __str__(self) -> str:
        """The plan in one line."""
        rungs = ", ".join(map(str, self.rungs))
        return (
            f"{self.rungs[0].settings} settings in {_counted(len(self.rungs), 'rung')}"
            f" ({rungs} seeds), then"
            f" the best {BEST}, no guidance and the model's own on {self.seeds} other seeds:"
            f" at most {self.pictures} pictures"
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def make_plan(
    pictures: int, unit: int, anchors: int, wanted: int, count: int | None = None
) -> Plan:
    """Make the plan with the most seeds that still tries enough settings.

    Args:
        pictures: Budget of pictures, at least 1.
        unit: Pictures of one setting that are drawn at once; seeds come in multiples of it.
        anchors: Settings that are always tried.
        wanted: Number of settings that is enough for up to 64 seeds; it grows in proportion to
            the seeds.
        count: Seeds of both halves; `None` chooses.

    Raises:
        ValueError: The budget is too small, or `count` does not fit `unit`.
    """
    check_count("budget", pictures)
    plans = [_plan_of(pictures, unit, anchors, seeds) for seeds in _sizes(unit, count)]
    affordable = [plan for plan in plans if plan.pictures <= pictures]
    if not affordable:
        raise ValueError(
            f"budget={pictures} pictures are too few to try {anchors} settings: at least"
            f" {plans[0].pictures} are needed, or fewer methods"
        )
    enough = [
        plan
        for plan in affordable
        if plan.rungs[0].settings >= wanted * max(1, plan.seeds // _MANY_SEEDS)
    ]
    return enough[-1] if enough else affordable[0]


def fewest_pictures(unit: int, anchors: int, count: int | None = None) -> int:
    """The smallest budget that `make_plan` accepts.

    Args:
        unit: As in `make_plan`.
        anchors: As in `make_plan`.
        count: As in `make_plan`.

    Raises:
        ValueError: `count` does not fit `unit`.
    """
    return _plan_of(0, unit, anchors, _sizes(unit, count)[0]).pictures


def _sizes(unit: int, count: int | None) -> list[int]:
    """Possible numbers of seeds in a half, from few to many."""
    check_count("batch_size", unit, most=MOST_SEEDS)
    least = unit * -(-_FEWEST_SEEDS // unit)
    if count is not None:
        if check_count("count", count, most=_LARGEST_COUNT) % (2 * unit) or count < 2 * least:
            raise ValueError(
                f"count={count} must be a multiple of twice the batch size ({2 * unit}), at least"
                f" {2 * least}"
            )
        return [count // 2]
    sizes = [least]
    while sizes[-1] * 2 <= MOST_SEEDS:
        sizes.append(sizes[-1] * 2)
    return sizes


def _plan_of(pictures: int, unit: int, anchors: int, seeds: int) -> Plan:
    """The plan with as many settings as the budget allows, at least the anchors."""
    least = max(min(_FIRST_SEEDS, seeds // 2), seeds // 8)
    rungs = [seeds]
    while rungs[0] // 2 >= least and rungs[0] // 2 % unit == 0:
        rungs.insert(0, rungs[0] // 2)
    plan = _with(anchors, anchors, rungs)
    for settings in range(anchors, pictures):
        more = _with(settings, anchors, rungs)
        if more.pictures > pictures:
            break
        plan = more
    return plan


def _with(settings: int, anchors: int, rungs: list[int]) -> Plan:
    kept = [max(-(-settings // 2**n), min(_FINALISTS, settings)) for n in range(len(rungs))]
    neighbours = min(settings // 3, settings - anchors)
    return Plan(neighbours, tuple(map(Rung, kept, rungs)))
