"""The search on pictures: it draws what the search asks for, within the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..batch.storage import Storage
from ..evaluate import estimate, paired_difference
from .gallery import Gallery
from .halving import prefer_cheaper, search
from .plan import BEST, MOST_SHOWN, Plan
from .result import Row, Tuned
from .scores import Score, halves_of
from .settings import TuneSettings
from .space import Candidate, Space

JOURNAL = "journal.json"

_REPETITIONS = 200

Report = Callable[[int, int, str, str], object]
"""Called with the number of drawn pictures, the largest number of pictures, the next setting and
the best one so far."""


class Journal:
    """Decisions that depended on time, in order, so that a resumed run makes the same ones."""

    def __init__(self, storage: Storage) -> None:
        """Read the earlier decisions.

        Args:
            storage: The folder of the run.
        """
        self._storage = storage
        self._entries: list[Any] = storage.parsed(JOURNAL, _list) or []
        self._next = 0

    def known(self, possible: range) -> int | None:
        """Return the next decision; `None` if it was not made yet.

        Args:
            possible: All that may be decided.

        Raises:
            ValueError: The journal holds something else.
        """
        self._next += 1
        if self._next > len(self._entries):
            return None
        found = self._entries[self._next - 1]
        if found not in possible:
            raise self._storage.damaged(JOURNAL, f"entry {self._next} is {found!r:.40}")
        return found

    def add(self, decision: int) -> int:
        """Store a new decision, and return it."""
        self._entries.append(decision)
        self._storage.write(JOURNAL, json.dumps(self._entries).encode())
        return decision


class Trial:
    """The run of a search: it draws and scores settings, then draws the best on other seeds."""

    def __init__(
        self,
        space: Space,
        gallery: Gallery,
        score: Score,
        plan: Plan,
        settings: TuneSettings,
        journal: Journal,
        report: Report | None = None,
    ) -> None:
        """Store the arguments; draw nothing yet.

        Args:
            space: The settings that can be tried.
            gallery: The source of pictures.
            score: The score that ranks settings.
            plan: Numbers of settings and seeds.
            settings: Settings of the run.
            journal: Journal of the run.
            report: Called before each chunk of pictures.
        """
        self.space, self.gallery, self.score, self.plan = space, gallery, score, plan
        self._seed, self._seconds = settings.seed, settings.budget.seconds
        self._journal, self._report, self._best = journal, report, ""
        self._tried: dict[Candidate, None] = {}
        self._reached = 0

    def run(self) -> Tuned:
        """Search, choose, and draw the best settings on the other half of the seeds.

        Raises:
            FloatingPointError: Without guidance, a picture is NaN or infinite.
        """
        first = self.plan.rungs[0].settings - self.plan.neighbours
        listed = self.space.listed(first, self._seed)
        # If all that were left failed at later pictures, no guidance is all that can be drawn.
        ranked = search(listed, self.plan, self.scores, self._neighbours) or [self.space.unguided]
        return self._reported(ranked, self._choose(ranked))

    def scores(self, candidates: Sequence[Candidate], seeds: int) -> Mapping[Candidate, float]:
        """Draw and score settings for `search`.

        Args:
            candidates: The settings.
            seeds: Number of seeds, of those for choosing.
        """
        self._tried |= dict.fromkeys(candidates)
        drawn = list(dict.fromkeys([self.space.unguided, *candidates]))
        self._reached = self._sweep(drawn, 0, seeds, self._end_of(len(candidates), seeds))
        found = {each: self._score_of(each) for each in self._sound(candidates)}
        self._best = str(min(found, key=lambda each: found[each], default=""))
        return found

    def _end_of(self, settings: int, seeds: int) -> float:
        """The time when a rung must end, in seconds since the run began.

        If pictures take longer than planned, all rungs and the report have fewer seeds.
        """
        if self._seconds is None:
            return math.inf
        first = self.plan.rungs[0]
        # In the first rung, the listed settings leave time for their neighbours.
        part = min(settings / first.settings, 1) if seeds == first.seeds else 1
        return self._seconds * self.plan.share(seeds) * part

    def _values(self, candidate: Candidate, first: int, end: int, repetitions: int) -> Tensor:
        """Scores on all pictures and on halves of them, the same halves for all settings."""
        halves = halves_of(end - first, repetitions, self._seed)
        unguided = self.gallery.of(self.space.unguided, first, end)
        return self.score.values(self.gallery.of(candidate, first, end), unguided, halves)

    def _score_of(self, candidate: Candidate) -> float:
        return float(self._values(candidate, 0, self._reached, 0)[0])

    def _sweep(self, candidates: Sequence[Candidate], first: int, end: int, until: float) -> int:
        """Draw all settings on the same seeds while there is time; return the end of the seeds."""
        shown = range(self.plan.seeds, self.plan.seeds + MOST_SHOWN)
        unit, least = self.gallery.unit, first + self.gallery.fewest
        known = self._journal.known(range(least, end + 1, unit))
        for chunk in range(first, end if known is None else known, unit):
            missing = [c for c in self._sound(candidates) if not self.gallery.has(c, chunk)]
            # What a score needs is always drawn.
            is_open = known is None and chunk >= least and missing
            if is_open and not self._is_time_for(len(missing), until):
                return self._journal.add(chunk)
            # Drawn ones, too, so that a setting fails at the same chunk as in an earlier run.
            for candidate in self._sound(candidates):
                if self._report is not None and candidate in missing:
                    done = self.gallery.drawn
                    self._report(done, self.plan.pictures, str(candidate), self._best)
                self.gallery.draw(candidate, chunk, keep_pictures=chunk in shown)
        return self._journal.add(end) if known is None else known

    def _is_time_for(self, chunks: int, until: float) -> bool:
        return self.gallery.elapsed + self.gallery.pace * chunks * self.gallery.unit <= until

    def _sound(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [each for each in candidates if each not in self.gallery.failures]

    def _neighbours(self, parents: Sequence[Candidate], count: int) -> Sequence[Candidate]:
        known = self._journal.known(range(count + 1))
        if known is None:
            first = self.plan.rungs[0]
            until = self._end_of(first.settings, first.seeds)
            # Neighbours are drawn on as many seeds as the others were.
            chunks = count * self._reached // self.gallery.unit
            known = self._journal.add(count if self._is_time_for(chunks, until) else 0)
        return self.space.neighbours(parents, known, self._seed, self._tried)

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
                paired_difference(of_each, values[own]) if own in values else None,
                self.gallery.of(each, first, end),
            )
            for each, of_each in values.items()
        )
        candidates = [row.candidate for row in rows]
        return Tuned(
            rows=rows,
            # A setting that fails only on the other seeds is useless, too.
            chosen=next(
                candidates.index(each) for each in (chosen, *ranked, unguided) if each in candidates
            ),
            own=own,
            ranking=tuple((each, self._score_of(each)) for each in ranked),
            seeds=(self._reached, end - first),
            tried=len(self._tried),
            failures={str(each): why for each, why in self.gallery.failures.items()},
            pictures=self.gallery.drawn,
            seconds=self.gallery.elapsed,
            plan=self.plan,
            steps=self.space.steps,
            score=self.score,
        )


def _list(content: bytes) -> list[Any]:
    found: Any = json.loads(content)
    if not isinstance(found, list):
        raise ValueError("it must hold a JSON array")
    return found
