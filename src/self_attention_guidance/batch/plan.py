"""The missing part of a list, and the units in which it is drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from ..generate.record import difference
from .crew import TRIES
from .drawing import Unit, row_of_task, shard_file
from .lists import PromptList
from .manifest import Finished, Manifest
from .tasks import COLUMNS, BadRow, Defaults, Task, bad_row, tasks_of, unconditional_tasks

Item = Task | BadRow
Source = PromptList | int

# In the manifest, "image" is the number of a picture in its row.
_GIVEN = ["start_image" if n == "image" else n for n in COLUMNS if n not in ("id", "num_images")]


def items_of(source: Source, defaults: Defaults) -> Iterator[Item]:
    """All pictures and bad rows of a list, in its order.

    Args:
        source: A list, or a number of pictures without a prompt.
        defaults: Values for the empty cells of rows.

    Raises:
        ValueError: The rest of the list cannot be read.
    """
    if isinstance(source, int):
        yield from unconditional_tasks(source, defaults)
        return
    for number, values in enumerate(source):
        try:
            yield from tasks_of(number, values, defaults)
        except ValueError as error:
            yield bad_row(number, values, error)


class Plan:
    """The finished and the missing part of a list.

    The whole list is read once, before work begins: it is known to be complete, and later changes
    to it have no effect.

    Attributes:
        missing: Tasks to draw, in the order of the list, each with its number among all tasks.
        bad: Rows that cannot be drawn and are not in the manifest yet.
        total: Pictures that the list asks for; a row that cannot be read counts as one.
        done: How many of them are drawn.
        failed: How many of them failed and are not tried again.
        shards: Files of shards that hold finished pictures, so none may be replaced.
        gone: How many were drawn, but their files were deleted or are empty; they are missing.
        unused: Columns of the list that are not used.
    """

    def __init__(
        self,
        source: Source,
        defaults: Defaults,
        manifest: Manifest,
        retry_failed: bool,
        begins_anew: bool = False,
    ) -> None:
        """Compare a list with a manifest.

        Args:
            source: A list, or a number of pictures without a prompt.
            defaults: Values for the empty cells of rows.
            manifest: What earlier runs did.
            retry_failed: Whether failed pictures count as missing.
            begins_anew: Whether what earlier runs did does not count.

        Raises:
            ValueError: The list cannot be read or is empty, or an existing picture was drawn with
                other settings.
        """
        self.manifest = manifest
        self.retry_failed = retry_failed
        self.missing: list[tuple[int, Task]] = []
        self.bad: list[BadRow] = []
        self.tasks = self.total = self.done = self.failed = 0
        files = {} if begins_anew else manifest.files()
        lost = manifest.storage.gone(file for file in files.values() if file)
        gone = {picture for picture, file in files.items() if file in lost}
        self.shards = {file for file in files.values() if file and file.endswith(".tar")} - lost
        del files  # it may be large
        known = {} if begins_anew else manifest.finished()
        finished = {key: found for key, found in known.items() if key not in gone}
        for item in items_of(source, defaults):
            self._add(item, finished)
        self.gone = sum((task.row, task.image) in gone for _, task in self.missing)
        columns = source.columns if isinstance(source, PromptList) else ()
        self.unused = [name for name in columns if name not in COLUMNS]
        if not self.total:
            raise ValueError("prompts: the list must hold at least one row")

    def _add(self, item: Item, finished: Finished) -> None:
        self.total += 1
        is_task = isinstance(item, Task)
        digest, is_bad = finished.get((item.row, item.image if is_task else 0), (None, True))
        if digest != item.digest and not is_bad:  # otherwise it is missing, or was corrected
            raise ValueError(
                f"prompts: row {item.row} (from 0) was drawn with {self._difference(item)}: go on"
                " with the same list and options (rows may be added at the list's end), choose"
                " another place, or start again with --overwrite"
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
            size: Largest number of tasks in a unit.
            is_sharded: Whether each unit has its own tar file.
        """
        if not is_sharded:
            for first in range(0, len(self.missing), size):
                yield Unit(tuple(task for _, task in self.missing[first : first + size]))
            return
        for number, numbered in itertools.groupby(self.missing, lambda each: each[0] // size):
            tasks = tuple(task for _, task in numbered)
            whole = min(size, self.tasks - number * size)
            # Rows that were corrected move the later ones to other numbers.
            is_free = shard_file(f"{number:06d}") not in self.shards
            yield Unit(tasks, _shard_name(number, tasks, is_free and len(tasks) == whole))

    def _difference(self, item: Item) -> str:
        """How an existing picture was drawn, where that differs from what the list now asks for."""
        if isinstance(item, BadRow):
            return f"other cells, and {item.error}"
        before, row = self.manifest.row_of(item.row, item.image), row_of_task(item)
        left_open = [name for name in _GIVEN if row[name] is None]  # the manifest has the model's
        given = [name for name in _GIVEN if name not in left_open]
        changed = difference({n: before.get(n) for n in given}, {n: row[n] for n in given})
        if not changed and "start_image" in given:
            left_open = ["content of its image or mask"]
        return changed or f"another {' or '.join(left_open)}"


def after_death(unit: Unit, deaths: int) -> list[Unit]:
    """What to try after a unit's worker died: each task alone, to find the cause.

    Args:
        unit: The unit.
        deaths: How many workers died while they had it.
    """
    # Single tasks would split a shard into many small ones, so it is first tried again whole.
    is_last_try = deaths >= TRIES
    if len(unit.tasks) > 1 and (unit.shard is None or is_last_try):
        number = (unit.shard or "").split("-")[0]
        names = (unit.shard and f"{number}-{_digest([task])}" for task in unit.tasks)
        return [Unit((task,), name) for task, name in zip(unit.tasks, names, strict=True)]
    return [] if is_last_try else [unit]


def _shard_name(number: int, tasks: tuple[Task, ...], is_plain: bool) -> str:
    """The name of a shard; one that is drawn later must not replace another."""
    return f"{number:06d}" if is_plain else f"{number:06d}-{_digest(tasks)}"


def _digest(tasks: Iterable[Task]) -> str:
    names = " ".join(task.name for task in tasks)
    return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
