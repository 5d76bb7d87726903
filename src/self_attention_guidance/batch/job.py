"""Drawing a list: its missing pictures are drawn, and the manifest records each."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..checks import check_count
from .artists import Artist, Model
from .crew import Crew, Lost
from .drawing import (
    IMAGES,
    JOB,
    Row,
    Unit,
    UnitResult,
    UnitWorker,
    check_identity,
    row_of_bad_row,
    row_of_task,
)
from .manifest import MANIFEST, PARTS, Manifest
from .plan import Plan, Source, after_death
from .storage import Storage, json_object
from .tasks import Defaults
from .workers import distribute

# A part of the manifest is written after this many rows or seconds; `kill -9` loses no more.
_ROWS_IN_PART = 1000
_SECONDS_OF_PART = 5.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The progress of a list.

    Attributes:
        total: Pictures that the list asks for; a row that cannot be read counts as one.
        done: How many of these are drawn.
        failed: How many of these failed; the manifest says why.
        drawn: How many of the drawn ones this run drew.
        cut: How many of these have a prompt that was too long; the manifest has its unread end.
        seconds: How long this run has taken.
    """

    total: int
    done: int
    failed: int
    drawn: int = 0
    cut: int = 0
    seconds: float = 0.0


Progress = Callable[[Summary], object]


class BatchJob:
    """A list of pictures and their folder; a job that was killed resumes.

    A picture depends only on its task, the model and `together`, not on batches, workers, order
    or restarts.
    """

    def __init__(
        self,
        source: Source,
        out: str,
        make_artist: Callable[[], Artist],
        defaults: Defaults,
        *,
        batch_size: int = 8,
        together: int = 1,
        shard_size: int | None = None,
        overwrite: bool = False,
        retry_failed: bool = False,
    ) -> None:
        """Check what can be checked without the list and without the model.

        Args:
            source: A list, or a number of pictures without a prompt.
            out: The folder, or its URL; see `Storage`.
            make_artist: Loads the model, in each worker; `Model` is one. It must be picklable.
            defaults: Values for the empty cells of rows.
            batch_size: Pictures that each of several workers gets at once, at least 1. Its death
                costs no more. Pictures do not depend on it.
            together: Pictures in one pass of the network, at least 1. The last bits of pictures
                depend on it; with 1, each is as if drawn alone.
            shard_size: Pictures in a tar file, at least 1; `None` gives each its own file.
            overwrite: Whether to delete what an earlier run left in `out`, once the list is read
                and the model is loaded.
            retry_failed: Whether to try again what failed in an earlier run.

        Raises:
            ValueError: An argument is outside its range.
        """
        self.source = source
        self.make_artist = make_artist
        self.defaults = defaults
        self.batch_size = check_count("batch_size", batch_size)
        self.together = check_count("together", together)
        self.shard_size = None if shard_size is None else check_count("shard_size", shard_size)
        self.overwrite = overwrite
        self.retry_failed = retry_failed
        self.storage = Storage(out)
        self.storage.make()
        self.manifest = Manifest(self.storage)

    def run(
        self,
        crew: Crew | None = None,
        on_progress: Progress | None = None,
        note: Callable[[str], object] = lambda line: None,
    ) -> Summary:
        """Draw the missing pictures.

        Args:
            crew: The workers; `None` is this process.
            on_progress: Called once the amount of work is known, and after each unit.
            note: Called with lines about the list and the folder before drawing begins, and about
                workers that wait.

        Raises:
            ValueError: The list cannot be read, the model cannot be loaded, another run uses the
                folder, or it holds pictures of another job.
            OSError: Something cannot be written; finished pictures stay, and the next run resumes.
            ChildProcessError: Workers die, or their device no longer responds; likewise.
        """
        with self.storage.locked():
            plan = Plan(
                self.source, self.defaults, self.manifest, self.retry_failed, self.overwrite
            )
            if plan.unused:
                note(f"columns that are not used: {', '.join(plan.unused)}"[:200])
            if plan.gone:
                note(f"{plan.gone} of {plan.total} pictures are gone or empty, and are drawn again")
            run = _Run(self, plan, crew or Crew(), on_progress, note)
            try:
                run.draw()
                self.manifest.join()
            except OSError as error:
                reason = error.strerror or " ".join(str(error).split())
                without = " without overwrite=True" if self.overwrite and run.has_begun else ""
                # What workers die of has nothing to do with the folder.
                is_of_workers = isinstance(error, ChildProcessError)
                place = "" if is_of_workers else f"out={self.storage.url!r}: "
                raise (ChildProcessError if is_of_workers else OSError)(
                    f"{place}{reason}; {run.summary.done} of {plan.total}"
                    f" pictures are done, and the same command{without} resumes"
                ) from error
            return run.summary

    def remove_earlier(self) -> None:
        """Delete what an earlier run left in the folder."""
        parts = self.storage.names(PARTS)
        # A folder of that name that is not of an earlier run is the user's own.
        if any(map(self.storage.exists, (JOB, MANIFEST, *parts[:1]))):
            # What shows that there was an earlier run is deleted last.
            self.storage.remove(IMAGES, PARTS, MANIFEST, JOB)


class _Run:
    """One run of a job, in its locked folder."""

    def __init__(
        self,
        job: BatchJob,
        plan: Plan,
        crew: Crew,
        on_progress: Progress | None,
        note: Callable[[str], object],
    ) -> None:
        self.job = job
        self.plan = plan
        self.crew = crew
        self.on_progress = on_progress
        self.note = note
        self.asked: str | None = None
        self.has_begun = not job.overwrite
        self.has_worked = False
        self.identity = None if job.overwrite else self._identity()
        self.summary = Summary(total=plan.total, done=plan.done, failed=plan.failed)
        self.started = self.written = time.monotonic()
        self.rows: list[Row] = []

    def draw(self) -> None:
        """Draw what is missing; refuse a folder of another model's pictures."""
        job = self.job
        self._report()
        if self.plan.bad:
            self._add([row_of_bad_row(bad) for bad in self.plan.bad])
        # A single worker gets the smallest possible units, so that its death costs little.
        size = job.together if self.crew.is_here else max(job.batch_size, job.together)
        units = self.plan.units(job.shard_size or size, job.shard_size is not None)
        make_worker = functools.partial(
            UnitWorker, job.make_artist, job.storage, job.together, self.identity
        )
        results = distribute(
            units, make_worker, self.crew, after_death, on_ready=self._begin, note=self.note
        )
        try:
            for unit, result in results:
                self._add(self._rows(unit, result))
        finally:
            results.close()
            # Pictures whose rows cannot be written now will be drawn again.
            with suppress(OSError):
                self._write()
        self._begin()
        self._write()
        if not self.has_worked and self.identity is not None and self.asked != self._asked_now():
            self._check_finished(self.identity)

    def _begin(self) -> None:
        """Delete an earlier run that is to be replaced, now that nothing else can be wrong."""
        if not self.has_begun:
            self.job.remove_earlier()
        self.has_begun = True

    def _check_finished(self, expected: dict[str, Any]) -> None:
        """Refuse a finished folder of another model or guidance.

        Loading the model takes long, so this is done only if something else is asked for than when
        the pictures were drawn.
        """
        job = self.job
        found = UnitWorker(job.make_artist, job.storage, job.together).identity
        # What is not drawn does not depend on this process.
        own = {"threads": expected.get("threads")}
        check_identity(found | own, expected)

    def _asked_now(self) -> str:
        asked = self.job.make_artist
        if isinstance(asked, Model):  # a folder has several names
            asked = replace(asked, name=asked.find())
        return repr((asked, self.job.together))

    def _rows(self, unit: Unit, result: UnitResult | Lost) -> list[Row]:
        if isinstance(result, Lost):
            return [row_of_task(task) | {"error": result.reason} for task in unit.tasks]
        self.has_worked = True
        if self.identity is None:
            self.identity = result.identity
            content = {
                "shard_size": self.job.shard_size,
                "asked": self._asked_now(),
                "identity": self.identity,
            }
            self.job.storage.write(JOB, json.dumps(content, indent=2).encode())
        check_identity(result.identity, self.identity)
        return result.rows

    def _add(self, rows: list[Row]) -> None:
        self.rows += rows
        failed = sum(row.get("error") is not None for row in rows)
        drawn = len(rows) - failed
        self.summary = replace(
            self.summary,
            done=self.summary.done + drawn,
            failed=self.summary.failed + failed,
            drawn=self.summary.drawn + drawn,
            cut=self.summary.cut + sum(bool(row.get("unread")) for row in rows),
        )
        if len(self.rows) >= _ROWS_IN_PART or time.monotonic() - self.written > _SECONDS_OF_PART:
            self._write()
        self._report()

    def _write(self) -> None:
        if not self.has_begun:
            return
        self.job.manifest.add(self.rows)
        self.rows = []
        self.written = time.monotonic()

    def _report(self) -> None:
        self.summary = replace(self.summary, seconds=time.monotonic() - self.started)
        if self.on_progress is not None:
            self.on_progress(self.summary)

    def _identity(self) -> dict[str, Any] | None:
        """Identity of the model that drew the existing pictures; `None` if there are none."""
        storage = self.job.storage
        stored = storage.parsed(JOB, functools.partial(json_object, identity=dict))
        if stored is None:
            if self.plan.done:
                raise storage.damaged(JOB, "it is gone, and says how the pictures were drawn")
            return None
        self.asked = stored.get("asked")
        shard_size = stored.get("shard_size")
        check_identity({"shard_size": self.job.shard_size}, {"shard_size": shard_size})
        return stored["identity"]
