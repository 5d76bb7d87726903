"""What of a list is missing, and in which units it is drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..generate.record import difference
from ..generate.workers import TRIES
from .drawing import Row, Unit, row_of_task
from .lists import PromptList
from .manifest import Finished
from .tasks import COLUMNS, BadRow, Defaults, Task, bad_row, tasks_of, unconditional_tasks

Item = Task | BadRow
Source = PromptList | int

_TOLD = [name for name in COLUMNS if name not in ("id", "num_images")]


def items_of(source: Source, defaults: Defaults) -> Iterator[Item]:
    """All that a list asks for, in its order.

    Args:
        source: A list, or a number of pictures without a prompt.
        defaults: What holds where a row says nothing.

    Raises:
        ValueError: The list cannot be read on.
    """
    if isinstance(source, int):
        yield from unconditional_tasks(source, defaults)
        return
    for number, values in enumerate(source):
        try:
            yield from tasks_of(number, values, defaults)
        except ValueError as error:
            yield bad_row(number, values, error)


def unused_columns(source: Source) -> list[str]:
    """Columns of a list's first row that mean nothing here.

    Args:
        source: A list, or a number of pictures without a prompt.
    """
    first = next(iter(source), {}) if isinstance(source, PromptList) else {}
    return [] if isinstance(first, ValueError) else [n for n in first if n not in COLUMNS]


@dataclass
class Plan:
    """What is there of a list, and what is not.

    Attributes:
        source: A list, or a number of pictures without a prompt.
        defaults: What holds where a row says nothing.
        finished: What the manifest holds.
        retry_failed: Whether what failed is missing.
        row_of: The manifest's row of a picture, by the numbers of its row and in it.
        total: Pictures that the list asks for; a row that cannot be read counts as one.
        done: How many of them are there.
        failed: How many of them failed, and are not missing.
    """

    source: Source
    defaults: Defaults
    finished: Finished
    retry_failed: bool
    row_of: Callable[[int, int], Row]
    total: int = 0
    done: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        """Reads the whole list, so that its end is known to be there before work begins.

        Raises:
            ValueError: The list cannot be read, or is empty, or a picture that is there was of
                other settings.
        """
        for item in items_of(self.source, self.defaults):
            self.total += 1
            if not self._is_missing(item):
                is_bad = self._found(item)[1]
                self.done += not is_bad
                self.failed += is_bad
        if not self.total:
            raise ValueError("prompts: the list must hold at least one row")

    def units(
        self, size: int, is_sharded: bool, on_bad_row: Callable[[BadRow], object]
    ) -> Iterator[Unit]:
        """What is missing, in the order of the list.

        Args:
            size: Most tasks of a unit.
            is_sharded: Whether each unit has a tar file for itself.
            on_bad_row: Called with each row that no picture can be drawn of.
        """
        tasks = self._tasks(on_bad_row)
        if not is_sharded:
            missing = (task for task in tasks if self._is_missing(task))
            while unit := tuple(itertools.islice(missing, size)):
                yield Unit(unit)
            return
        for number in itertools.count():
            window = list(itertools.islice(tasks, size))
            if not window:
                return
            missing = tuple(task for task in window if self._is_missing(task))
            if missing:
                yield Unit(missing, _shard_name(number, missing, len(missing) == len(window)))

    def _tasks(self, on_bad_row: Callable[[BadRow], object]) -> Iterator[Task]:
        for item in items_of(self.source, self.defaults):
            if isinstance(item, Task):
                yield item
            elif self._is_missing(item):
                on_bad_row(item)

    def _found(self, item: Item) -> tuple[int, bool]:
        found = self.finished.find(item.row, item.image if isinstance(item, Task) else 0)
        return found or (-1, True)

    def _is_missing(self, item: Item) -> bool:
        digest, is_bad = self._found(item)
        if digest == item.digest:
            return is_bad and self.retry_failed
        if is_bad:  # it is not there, or the row was mended since
            return True
        raise ValueError(
            f"prompts: row {item.row} (from 0) was drawn with {self._difference(item)}: give what"
            " was given, with rows added at the end at most, choose another place, or begin anew"
            " with --overwrite"
        )

    def _difference(self, item: Item) -> str:
        """How the picture that is there was drawn, where it is not what the list now asks for."""
        if isinstance(item, BadRow):
            return f"other cells, and {item.error}"
        before, row = self.row_of(item.row, item.image), row_of_task(item)
        left_open = [name for name in _TOLD if row[name] is None]  # the manifest has the model's
        given = [name for name in _TOLD if name not in left_open]
        told = difference({n: before.get(n) for n in given}, {n: row[n] for n in given})
        return told or f"another {' or '.join(left_open)}"


def after_death(unit: Unit, deaths: int) -> list[Unit]:
    """What is done with a unit whose worker died: each task alone, to find the one to blame.

    Args:
        unit: The unit.
        deaths: How many workers died that had it.
    """
    # Tasks of their own would make many small shards of one, so that it is tried again first.
    is_last_try = deaths >= TRIES
    if len(unit.tasks) > 1 and (unit.shard is None or is_last_try):
        number = (unit.shard or "").split("-")[0]
        names = (unit.shard and f"{number}-{_digest([task])}" for task in unit.tasks)
        return [Unit((task,), name) for task, name in zip(unit.tasks, names, strict=True)]
    return [] if is_last_try else [unit]


def _shard_name(number: int, tasks: tuple[Task, ...], is_whole: bool) -> str:
    """What is drawn of a shard later, after a failure, must not replace it."""
    return f"{number:06d}" if is_whole else f"{number:06d}-{_digest(tasks)}"


def _digest(tasks: Iterable[Task]) -> str:
    names = " ".join(task.name for task in tasks)
    return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
