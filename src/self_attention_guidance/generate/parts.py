"""Finished batches of an unfinished run, in a folder, so that a killed run can go on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .record import difference

SETTINGS_NAME = "settings.json"
FINISHED_NAME = "finished.json"

_PART = re.compile(r"(\d{8,})-(\d+)\.npy")
_UNFINISHED = ".unfinished"  # the end of the name of a file that is being written


class _Part(NamedTuple):
    first: int
    end: int
    path: Path


class Parts:
    """A folder of finished batches, one file each, beside the settings that made them.

    Files appear whole or not at all. The settings are there before the first batch and go after
    the last, so at every moment they are those of the batches beside them. Once the samples are in
    their file, a mark says so, and batches still there are left over from being deleted.

    Attributes:
        folder: The folder; it appears with the first batch.
        settings: What identifies the run: names and values that JSON can hold.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Looks at nothing yet.

        Args:
            folder: Where the batches are, or will be.
            settings: What identifies the run.
        """
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._has_settings = False

    def difference(self) -> str | None:
        """What the settings of the batches in the folder are, where they are not this run's.

        Returns:
            `None` if they agree or if there are no batches.
        """
        if not self._parts():
            return None
        try:
            there = json.loads((self.folder / SETTINGS_NAME).read_text(encoding="utf-8"))
            return difference(there, self.settings)
        except (OSError, ValueError, TypeError, AttributeError):
            return f"{SETTINGS_NAME} is missing or damaged"

    def mark_finished(self, count: int) -> None:
        """Says that the samples are in their file, so that the batches may go.

        Args:
            count: How many samples that is.
        """
        _write(self.folder / FINISHED_NAME, json.dumps(self._finished(count), indent=2).encode())

    def is_finished(self, count: int) -> bool:
        """Whether this run was marked as finished.

        Args:
            count: With how many samples.
        """
        try:
            there: object = json.loads((self.folder / FINISHED_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return there == self._finished(count)

    @property
    def drawn(self) -> int:
        """How many pictures there are, from the first one without a gap."""
        parts = self._parts()
        return parts[-1].end if parts else 0

    def save(self, first: int, pictures: NDArray[np.uint8]) -> None:
        """Adds a batch.

        Args:
            first: Number of its first picture: `drawn`.
            pictures: uint8, (pictures, height, width, channels).
        """
        if not self._has_settings:
            self.folder.mkdir(exist_ok=True)
            _write(self.folder / SETTINGS_NAME, json.dumps(self.settings, indent=2).encode())
            self._has_settings = True
        path = self.folder / f"{first:08d}-{len(pictures)}.npy"
        unfinished = path.with_name(path.name + _UNFINISHED)
        with open(unfinished, "wb") as file:
            np.save(file, pictures)
            _flush(file)
        os.replace(unfinished, path)

    def read(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """The first pictures, batch by batch.

        Args:
            count: How many, at most `drawn`.

        Yields:
            uint8, (pictures, height, width, channels).
        """
        for part in self._parts():
            if part.first < count:
                yield np.load(part.path, allow_pickle=False)[: count - part.first]

    def temporary_path(self, name: str) -> Path:
        """Where a file may be written before it is moved out of the folder; `remove` removes it.

        Args:
            name: Its name.
        """
        return self.folder / (name + _UNFINISHED)

    def remove(self) -> None:
        """Deletes the batches, their settings and the folder, unless other files are in it."""
        for part in reversed(self._numbered()):
            part.path.unlink()
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            path.unlink()
        (self.folder / SETTINGS_NAME).unlink(missing_ok=True)
        (self.folder / FINISHED_NAME).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _finished(self, count: int) -> dict[str, Any]:
        return self.settings | {"num_samples": count}

    def _numbered(self) -> list[_Part]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        matches = [(_PART.fullmatch(path.name), path) for path in paths]
        parts = [
            _Part(int(match[1]), int(match[1]) + int(match[2]), path)
            for match, path in matches
            if match
        ]
        return sorted(parts)

    def _parts(self) -> list[_Part]:
        """The batches that follow each other from picture 0 on."""
        following: list[_Part] = []
        if (self.folder / FINISHED_NAME).exists():
            return following
        first = 0
        for part in self._numbered():
            if part.first == first:
                following.append(part)
                first = part.end
        return following


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(content)
        _flush(file)
    os.replace(unfinished, path)


def _flush(file: Any) -> None:
    """On the disk before the file gets its name, should the power fail, too."""
    file.flush()
    os.fsync(file.fileno())
