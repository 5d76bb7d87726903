"""Pictures on the disk for visitors to see and to keep, the oldest removed as new ones come."""

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
    """A temporary folder with the newest pictures of all visitors; it goes with the process."""

    def __init__(self, most: int = _MOST_FILES) -> None:
        """Make the folder.

        Args:
            most: Files that are kept, at least 1.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="sag-demo-")
        self._files: deque[Path] = deque()
        self._most = most
        self._made = 0
        self._turn = threading.Lock()

    def save(self, image: Image.Image, name: str, record: Mapping[str, Any] | str = "") -> str:
        """Write a picture with its settings as metadata.

        Args:
            image: The picture.
            name: Begins the file's name.
            record: How it was made, if that is to be told.

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
    """A record that calls visitors' files by their names: where they are here is nobody's."""
    if isinstance(record, str):
        return record
    given = record["settings"]
    names = {key: Path(given[key]).name for key in ("image", "mask") if given.get(key)}
    return {**record, "settings": {**given, **names}}
