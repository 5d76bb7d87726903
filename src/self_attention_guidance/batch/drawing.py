"""The work of a worker: to draw units of tasks into files, and report on each."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from ..generate.drawing import GeneratedImage
from ..generate.failing import OUT_OF_MEMORY
from ..generate.metadata import png_text
from ..generate.record import difference
from ..generate.schedulers import label_of
from .artists import Artist
from .storage import Storage
from .tasks import BadRow, Task

JOB = "job.json"
IMAGES = "images"
_ROWS_IN_FOLDER = 1000

Row = dict[str, Any]
# A task, its drawing or `None` if it failed, and its row of the manifest.
_Drawn = tuple[Task, GeneratedImage | None, Row]


@dataclass(frozen=True)
class Unit:
    """Tasks that a worker draws before it gets the next ones.

    Attributes:
        tasks: The tasks, in the order of the list.
        shard: Name of the tar file for the pictures; `None` gives each picture its own file.
    """

    tasks: tuple[Task, ...]
    shard: str | None = None


@dataclass(frozen=True)
class UnitResult:
    """The results of a unit.

    Attributes:
        identity: Identity of the artist.
        rows: Rows of the manifest, one for each task.
    """

    identity: dict[str, Any]
    rows: list[Row]


class UnitWorker:
    """A worker that holds the model and draws units."""

    def __init__(
        self,
        make_artist: Callable[[], Artist],
        storage: Storage,
        together: int,
        expected: Mapping[str, Any] | None = None,
        stops_at_errors: bool = False,
    ) -> None:
        """Load the model.

        Args:
            make_artist: Loads the model.
            storage: Where the pictures go.
            together: Tasks in one pass of the network. Short batches are filled up to this size,
                because the last bits of what a network computes depend on it.
            expected: Identity of the artist that drew the existing pictures; `None` accepts any.
            stops_at_errors: Whether an error in one task stops the work; otherwise only that task
                fails.

        Raises:
            ValueError: The model is not the expected one.
            ChildProcessError: The device does not respond.
        """
        try:
            self.artist = make_artist()
        except RuntimeError as error:
            _refuse_broken_device(error)
            raise
        self.storage = storage
        self.together = together
        self.stops_at_errors = stops_at_errors
        self.identity = dict(self.artist.identity) | {
            "together": together,
            "threads": torch.get_num_threads(),
        }
        check_identity(self.identity, expected)

    def __call__(self, unit: Unit) -> UnitResult:
        """Draw a unit.

        Raises:
            OSError: A file cannot be written.
            ChildProcessError: The device no longer responds.
        """
        # Pictures are written as they are drawn: a shard may hold more than fit in memory.
        drawn = (found for group in _groups(unit.tasks) for found in self._draw_group(group))
        if unit.shard is None:
            rows = [self._save(task, drawing, row) for task, drawing, row in drawn]
        else:
            rows = self._save_shard(unit.shard, drawn)
        return UnitResult(self.identity, rows)

    def _draw_group(self, tasks: Sequence[Task]) -> Iterator[_Drawn]:
        waiting = list(tasks)
        while waiting:
            batch = waiting[: self.together]
            started = time.monotonic()
            try:
                drawings = self._draw(batch)
            except Exception as error:  # whatever is wrong, only this row may fail
                if _is_out_of_memory(error) and self.together > 1:
                    self.together //= 2
                    continue
                _refuse_broken_device(error)
                if self.stops_at_errors:
                    raise
                yield from self._draw_alone(batch, error)
            else:
                seconds = (time.monotonic() - started) / len(batch)
                for task, drawing in zip(batch, drawings, strict=True):
                    yield task, drawing, self._row(task, seconds)
            del waiting[: len(batch)]

    def _draw_alone(self, tasks: Sequence[Task], error: Exception) -> Iterator[_Drawn]:
        """Find the tasks that cause an error."""
        if len(tasks) > 1:
            for task in tasks:
                yield from self._draw_group([task])
            return
        reason = "out of memory" if _is_out_of_memory(error) else _line(error)
        yield tasks[0], None, self._row(tasks[0], None) | {"error": reason}

    def _draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        filled = [*tasks, *[tasks[-1]] * (self.together - len(tasks))]
        return self.artist.draw(filled)[: len(tasks)]

    def _row(self, task: Task, seconds: float | None) -> Row:
        return row_of_task(task) | {"together": self.together, "seconds": seconds}

    def _save(self, task: Task, drawing: GeneratedImage | None, row: Row) -> Row:
        if drawing is None:
            return row
        name = picture_file(task)
        content = _png(drawing)
        self.storage.write(name, content)
        return row | _facts(drawing, content) | {"file": name}

    def _save_shard(self, shard: str, drawn: Iterator[_Drawn]) -> list[Row]:
        rows: list[Row] = []
        for first in drawn:
            if first[1] is not None:  # without any, no shard is written
                return rows + self._write_shard(shard, itertools.chain([first], drawn))
            rows.append(first[2])
        return rows

    def _write_shard(self, shard: str, drawn: Iterable[_Drawn]) -> list[Row]:
        name = shard_file(shard)
        rows: list[Row] = []
        with self.storage.writing(name) as file, tarfile.open(fileobj=file, mode="w|") as archive:
            for task, drawing, row in drawn:
                if drawing is not None:
                    content = _png(drawing)
                    row = row | _facts(drawing, content) | {"file": name}
                    row["member"] = f"{task.name}.png"
                    _add(archive, row["member"], content)
                    _add(archive, f"{task.name}.json", _described(task, row))
                rows.append(row)
        return rows


def picture_file(task: Task) -> str:
    """Name of the file that a task's picture goes to.

    Args:
        task: The task.
    """
    return f"{IMAGES}/{task.row // _ROWS_IN_FOLDER:06d}/{task.name}.png"


def shard_file(shard: str) -> str:
    """Name of the tar file of a shard.

    Args:
        shard: The shard's name.
    """
    return f"{IMAGES}/{shard}.tar"


def row_of_task(task: Task) -> Row:
    """The manifest's values for a task before it is drawn.

    Args:
        task: The task.
    """
    settings = vars(task.settings)
    return {
        "row": task.row,
        "image": task.image,
        "id": task.id,
        "prompt": task.prompt,
        "negative_prompt": settings.get("negative_prompt"),
        "seed": task.seed,
        "width": settings.get("width"),
        "height": settings.get("height"),
        "steps": settings["num_inference_steps"],
        "guidance_scale": settings.get("guidance_scale"),
        "sag_scale": settings["sag_scale"],
        "start_image": settings.get("image"),
        "mask": settings.get("mask"),
        "strength": settings.get("strength"),
        "digest": task.digest,
        "finished": datetime.now(timezone.utc),
    }


def row_of_bad_row(bad: BadRow) -> Row:
    """The manifest's values for a row that cannot be drawn.

    Args:
        bad: The row.
    """
    now = datetime.now(timezone.utc)
    return vars(bad) | {"image": 0, "digest": bad.digest, "finished": now}


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any] | None) -> None:
    """Refuse to add pictures of one model to those of another.

    Args:
        found: Identity of the model.
        expected: Identity of the model that drew the existing pictures; `None` accepts any.

    Raises:
        ValueError: They differ.
    """
    changed = None if expected is None else difference(expected, found)
    if changed is not None:
        raise ValueError(
            f"out holds pictures with {changed}: go on with the same, choose another place, or"
            " start again with --overwrite"
        )


def _groups(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that can share a batch."""
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.settings, []).append(task)
    return list(groups.values())


def _png(drawing: GeneratedImage) -> bytes:
    file = io.BytesIO()
    drawing.image.save(file, format="PNG", pnginfo=png_text(drawing.record))
    return file.getvalue()


def _facts(drawing: GeneratedImage, content: bytes) -> Row:
    """Values that are known only once a picture is drawn, because the model decides them."""
    width, height = drawing.image.size
    record = drawing.record
    negative = drawing.unread_negative and f"negative_prompt: {drawing.unread_negative}"
    return {
        "sag_scale": record["guidance"]["scale"],
        "guidance": json.dumps(record["guidance"]),
        "scheduler": label_of(record["scheduler"], record["scheduler_config"]),
        "model": record["model"],
        "width": width,
        "height": height,
        "flagged": drawing.flagged,
        "weakened_predictions": record.get("weakened_predictions"),
        "unread": "\n".join(filter(None, (drawing.unread, negative))) or None,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _described(task: Task, row: Row) -> bytes:
    """The JSON of a picture in a shard, without times, so that equal runs write equal shards."""
    names = ("id", "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "sag_scale")
    values = {name: row.get(name) for name in (*names, "scheduler", "model", "guidance")}
    return json.dumps({"row": task.row, "image": task.image} | values, ensure_ascii=False).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def _refuse_broken_device(error: Exception) -> None:
    """Raise an error after which every picture of this process would fail."""
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        raise ChildProcessError(f"the device no longer responds: {_line(error)[:300]}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:1000]
    known = isinstance(error, ValueError | FloatingPointError)
    return text if known else f"{type(error).__name__}: {text}"
