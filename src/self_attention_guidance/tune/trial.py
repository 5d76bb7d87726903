"""The search on pictures: draws what it asks for, as far as the budget goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..evaluate import estimate, paired_difference
from .gallery import Gallery
from .halving import prefer_cheaper, search
from .plan import BEST, Plan
from .result import Row, Tuned
from .scores import Score, halves_of
from .settings import TuneSettings
from .space import Candidate, Space

_REPETITIONS = 200
_MOST_SHOWN = 8

Report = Callable[[int, int, str, str], object]
"""Called with how many pictures are drawn, how many there will be at most, the setting that is next
and the best one so far."""


class Trial:
    """Draws and scores settings as the search asks for them, then those that it found."""

    def __init__(
        self,
        space: Space,
        gallery: Gallery,
        score: Score,
        plan: Plan,
        settings: TuneSettings,
        report: Report | None = None,
    ) -> None:
        """Draws nothing yet.

        Args:
            space: What there is to choose from.
            gallery: Where pictures come from.
            score: What settings are ranked by.
            plan: How many settings and seeds.
            settings: Of the run.
            report: Called before each chunk of pictures.
        """
        self.space, self.gallery, self.score, self.plan = space, gallery, score, plan
        self._seed, self._seconds = settings.seed, settings.budget.seconds
        self._report, self._best = report, ""
        self._tried: dict[Candidate, None] = {}
        self._reached = 0
        self._last: Mapping[Candidate, float] = {}

    def run(self) -> Tuned:
        """Searches, chooses, and draws what was found on the other half of the seeds.

        Raises:
            FloatingPointError: Without guidance, a picture is NaN or infinite.
        """
        first = self.plan.rungs[0].settings - self.plan.neighbours
        listed = self.space.listed(first, self._seed)
        ranked = search(listed, self.plan, self.scores, self._neighbours)
        return self._reported(ranked, self._choose(ranked))

    def scores(self, candidates: Sequence[Candidate], seeds: int) -> Mapping[Candidate, float]:
        """As `search` asks for them.

        Args:
            candidates: The settings.
            seeds: On how many of the seeds to choose on.
        """
        self._tried |= dict.fromkeys(candidates)
        drawn = list(dict.fromkeys([self.space.unguided, *candidates]))
        self._reached = self._sweep(drawn, 0, seeds, self._end_of(len(candidates), seeds))
        sound = self._sound(candidates)
        found = {each: float(self._values(each, 0, self._reached, 0)[0]) for each in sound}
        self._last = found
        self._best = str(min(found, key=lambda each: found[each], default=""))
        return found

    def _end_of(self, settings: int, seeds: int) -> float:
        """When a rung must end, in seconds since the run began.

        If pictures take longer than was planned, all rungs and the report have fewer seeds.
        """
        if self._seconds is None:
            return math.inf
        first = self.plan.rungs[0]
        # Its listed settings leave time for their neighbours.
        part = min(settings / first.settings, 1) if seeds == first.seeds else 1
        return self._seconds * self.plan.share(seeds) * part

    def _values(self, candidate: Candidate, first: int, end: int, repetitions: int) -> Tensor:
        """Scores on all pictures and on halves of them, the same halves for all settings."""
        halves = halves_of(end - first, repetitions, self._seed)
        unguided = self.gallery.of(self.space.unguided, first, end)
        return self.score.values(self.gallery.of(candidate, first, end), unguided, halves)

    def _sweep(self, candidates: Sequence[Candidate], first: int, end: int, until: float) -> int:
        """Draws settings on seeds as far as time allows, on equally many each; returns how far."""
        shown = range(self.plan.seeds, self.plan.seeds + _MOST_SHOWN)
        for chunk in range(first, end, self.gallery.unit):
            missing = [c for c in self._sound(candidates) if not self.gallery.has(c, chunk)]
            # One chunk is drawn in any case.
            if chunk > first and missing and not self._is_time_for(len(missing), until):
                return chunk
            # Also those that are there: a setting fails where it failed before, and not earlier.
            for candidate in self._sound(candidates):
                if self._report is not None and candidate in missing:
                    done = self.gallery.drawn
                    self._report(done, self.plan.pictures, str(candidate), self._best)
                self.gallery.draw(candidate, chunk, keep_pictures=chunk in shown)
        return end

    def _is_time_for(self, chunks: int, until: float) -> bool:
        return self.gallery.elapsed + self.gallery.pace * chunks * self.gallery.unit <= until

    def _sound(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [each for each in candidates if each not in self.gallery.failures]

    def _neighbours(self, parents: Sequence[Candidate], count: int) -> Sequence[Candidate]:
        found = self.space.neighbours(parents, count, self._seed, self._tried)
        missing = sum(not self.gallery.has(each, 0) for each in found)
        first = self.plan.rungs[0]
        until = self._end_of(first.settings, first.seeds)
        # They are to be drawn on as many seeds as the others were.
        is_time = self._is_time_for(missing * self._reached // self.gallery.unit, until)
        return found if is_time or not missing else []

    def _choose(self, ranked: Sequence[Candidate]) -> Candidate:
        values = {each: self._values(each, 0, self._reached, _REPETITIONS) for each in ranked}
        costs = {each: self.gallery.of(each, 0, self._reached).evaluations for each in ranked}
        return prefer_cheaper(ranked, values, costs)

    def _reported(self, ranked: Sequence[Candidate], chosen: Candidate) -> Tuned:
        unguided, own = self.space.unguided, self.space.as_it_is
        best = [each for each in dict.fromkeys([chosen, *ranked]) if each != unguided][:BEST]
        shown = list(dict.fromkeys([unguided, *best, own]))
        first = self.plan.seeds
        end = self._sweep(shown, first, 2 * first, self._seconds or math.inf)
        values = {each: self._values(each, first, end, _REPETITIONS) for each in self._sound(shown)}
        rows = tuple(
            Row(
                each,
                estimate(of_each, self.score.least),
                paired_difference(of_each, values[unguided]),
                paired_difference(of_each, values.get(own, values[unguided])),
                self.gallery.of(each, first, end),
            )
            for each, of_each in values.items()
        )
        candidates = [row.candidate for row in rows]
        return Tuned(
            rows=rows,
            # One that fails only on the other seeds is of no use, either.
            chosen=next(
                candidates.index(each) for each in (chosen, *ranked, unguided) if each in candidates
            ),
            own=own,
            ranking=tuple((each, self._last[each]) for each in ranked),
            seeds=(self._reached, end - first),
            tried=len(self._tried),
            failures={str(each): why for each, why in self.gallery.failures.items()},
            pictures=self.gallery.drawn,
            seconds=self.gallery.elapsed,
            plan=self.plan,
            steps=self.space.steps,
            score=self.score,
        )
