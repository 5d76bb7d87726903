"""Pictures on the disk for visitors to see and download; the oldest make room for new ones."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..generate import save_png

_MOST_FILES = 400


class Pictures:
    """A temporary folder with the newest pictures of all visitors; it is deleted on exit."""

    def __init__(self, most: int = _MOST_FILES) -> None:
        """Make the folder.

        Args:
            most: Number of files to keep, at least 1.
        """
        # A drawing that still runs at exit may add a file while the folder is deleted.
        self._folder = tempfile.TemporaryDirectory(prefix="sag-demo-", ignore_cleanup_errors=True)
        self._files: deque[Path] = deque()
        self._most = most
        self._made = 0
        self._turn = threading.Lock()

    def save(self, image: Image.Image, name: str, record: Mapping[str, Any] | str = "") -> str:
        """Write a picture with its settings as metadata.

        Args:
            image: The picture.
            name: Start of the file's name.
            record: How it was made; empty stores nothing.

        Returns:
            The path of the PNG file.
        """
        with self._turn:
            self._made += 1
            path = Path(self._folder.name) / f"{self._made:06d}-{name}.png"
            save_png(image, path, _without_folders(record))
            self._files.append(path)
            while len(self._files) > self._most:
                self._files.popleft().unlink(missing_ok=True)
        return str(path)


def _without_folders(record: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
    """A record with the names of visitors' files, without the folders on this machine."""
    if isinstance(record, str):
        return record
    given = record["settings"]
    names = {key: Path(given[key]).name for key in ("image", "mask") if given.get(key)}
    return {**record, "settings": {**given, **names}}
