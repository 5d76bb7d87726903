"""The missing part of a list, and the units in which it is drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from ..generate.record import difference
from .drawing import Unit, row_of_task
from .lists import PromptList
from .manifest import Finished, Manifest
from .tasks import COLUMNS, BadRow, Defaults, Task, bad_row, tasks_of, unconditional_tasks
from .workers import TRIES

Item = Task | BadRow
Source = PromptList | int

# In the manifest, "image" is the number of a picture in its row.
_TOLD = ["start_image" if n == "image" else n for n in COLUMNS if n not in ("id", "num_images")]


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


class Plan:
    """The finished and the missing part of a list, which is read once, as a whole.

    Its end is known to be there before work begins, and what it holds when work ends is the same.

    Attributes:
        missing: Tasks that are to be drawn, in the order of the list, each with its number in it.
        bad: Rows that no picture can be drawn of, and that the manifest does not hold.
        total: Pictures that the list asks for; a row that cannot be read counts as one.
        done: How many of them are there.
        failed: How many of them failed, and are not missing.
    """

    def __init__(
        self, source: Source, defaults: Defaults, manifest: Manifest, retry_failed: bool
    ) -> None:
        """Compares a list with a manifest.

        Args:
            source: A list, or a number of pictures without a prompt.
            defaults: What holds where a row says nothing.
            manifest: What is there.
            retry_failed: Whether what failed is missing.

        Raises:
            ValueError: The list cannot be read, or is empty, or a picture that is there was of
                other settings.
        """
        self.manifest = manifest
        self.retry_failed = retry_failed
        self.missing: list[tuple[int, Task]] = []
        self.bad: list[BadRow] = []
        self.tasks = self.total = self.done = self.failed = 0
        finished = manifest.finished()
        for item in items_of(source, defaults):
            self._add(item, finished)
        if not self.total:
            raise ValueError("prompts: the list must hold at least one row")

    def _add(self, item: Item, finished: Finished) -> None:
        self.total += 1
        is_task = isinstance(item, Task)
        digest, is_bad = finished.get((item.row, item.image if is_task else 0), (None, True))
        if digest != item.digest and not is_bad:  # else it's not there, or was mended since
            raise ValueError(
                f"prompts: row {item.row} (from 0) was drawn with {self._difference(item)}: give"
                " what was given, with rows added at the end at most, choose another place, or"
                " begin anew with --overwrite"
            )
        if digest == item.digest and not (is_bad and self.retry_failed):
            self.done += not is_bad
            self.failed += is_bad
        elif is_task:
            self.missing.append((self.tasks, item))
        else:
            self.bad.append(item)
        self.tasks += is_task

    def units(self, size: int, is_sharded: bool) -> Iterator[Unit]:
        """The missing tasks, in the order of the list.

        Args:
            size: Most tasks of a unit.
            is_sharded: Whether each unit has a tar file for itself.
        """
        if not is_sharded:
            for first in range(0, len(self.missing), size):
                yield Unit(tuple(task for _, task in self.missing[first : first + size]))
            return
        for number, numbered in itertools.groupby(self.missing, lambda each: each[0] // size):
            tasks = tuple(task for _, task in numbered)
            whole = min(size, self.tasks - number * size)
            yield Unit(tasks, _shard_name(number, tasks, len(tasks) == whole))

    def _difference(self, item: Item) -> str:
        """How the picture that is there was drawn, where it is not what the list now asks for."""
        if isinstance(item, BadRow):
            return f"other cells, and {item.error}"
        before, row = self.manifest.row_of(item.row, item.image), row_of_task(item)
        left_open = [name for name in _TOLD if row[name] is None]  # the manifest has the model's
        given = [name for name in _TOLD if name not in left_open]
        changed = difference({n: before.get(n) for n in given}, {n: row[n] for n in given})
        if not changed and "start_image" in given:
            left_open = ["content of its image or mask"]
        return changed or f"another {' or '.join(left_open)}"


def after_death(unit: Unit, deaths: int) -> list[Unit]:
    """The retry of a unit whose worker died: each task alone, to find the cause.

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
    """A name for the part of a shard that is drawn later: it must not replace the first part."""
    return f"{number:06d}" if is_whole else f"{number:06d}-{_digest(tasks)}"


def _digest(tasks: Iterable[Task]) -> str:
    names = " ".join(task.name for task in tasks)
    return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
