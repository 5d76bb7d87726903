"""Sources of pictures: a folder of images, or arr_0 of an `.npz` file of ADM's evaluator.

Only the present batch is held in memory.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..generate.as_seen import FORMATS, as_seen

PICTURES_KEY = "arr_0"

# RuntimeError comes from encrypted archives and unknown compression.
_UNREADABLE = (OSError, zipfile.BadZipFile, RuntimeError)
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class PictureSource(Protocol):
    """Pictures of one size.

    Attributes:
        path: The folder or file, for messages.
        count: Number of pictures.
        size: Width and height in pixels.
    """

    path: Path
    count: int
    size: tuple[int, int]

    def batches(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """All pictures, batch by batch.

        Args:
            batch_size: Pictures in a batch; the last batch may be smaller.

        Yields:
            (batch, height, width, 3) uint8.

        Raises:
            ValueError: A picture cannot be read, or has another size.
        """
        ...


class FolderSource:
    """The images in a folder, as viewers show them: upright, transparent ones on white.

    Subfolders and hidden files, whose names start with a dot, are left out. Of an animation, the
    first picture is used. Values of 16 bits are scaled to 8.
    """

    def __init__(self, path: Path) -> None:
        """List the folder, and read the first image's size.

        Args:
            path: A folder.

        Raises:
            ValueError: It holds no image, or the first one cannot be read.
        """
        self.path = path
        suffixes = _suffixes()
        self._files = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in suffixes and file.name[0] != "." and file.is_file()
        )
        if not self._files:
            raise ValueError(f"{str(path)!r} holds no pictures: none of {', '.join(suffixes)}")
        self.count = len(self._files)
        height, width, _ = _read_image(self._files[0]).shape
        self.size = width, height

    def batches(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """All pictures, as in `PictureSource`."""
        for start in range(0, self.count, batch_size):
            yield np.stack([self._read(file) for file in self._files[start : start + batch_size]])

    def _read(self, file: Path) -> NDArray[np.uint8]:
        pixels = _read_image(file)
        height, width, _ = pixels.shape
        if (width, height) != self.size:
            raise ValueError(
                f"{str(file)!r} is {width}x{height}, {self._files[0].name} is"
                f" {self.size[0]}x{self.size[1]}: all pictures must have one size"
            )
        return pixels


def _suffixes() -> list[str]:
    known = Image.registered_extensions().items()
    return sorted(suffix for suffix, name in known if name in FORMATS)


def _read_image(file: Path) -> NDArray[np.uint8]:
    try:
        # Not by name: Pillow would map the file, and then it reads rotated TIFFs wrongly.
        with open(file, "rb") as content, Image.open(content, formats=FORMATS) as image:
            return np.asarray(as_seen(image))
    except UnidentifiedImageError as error:
        why = "it is no picture, or of an unknown format" if file.stat().st_size else "it is empty"
        raise ValueError(f"{str(file)!r} cannot be read as a picture: {why}") from error
    except Exception as error:  # each format has its own errors for broken files
        raise ValueError(f"{str(file)!r} cannot be read as a picture: {error}") from error


class NpzSource:
    """The array arr_0 of an `.npz` file: (pictures, height, width, 3) uint8."""

    def __init__(self, path: Path) -> None:
        """Read the array's shape.

        Args:
            path: An `.npz` file.

        Raises:
            ValueError: The file cannot be read, has no such array, or one of another shape or type.
        """
        self.path = path
        with self._opened() as (_, shape):
            self.count = shape[0]
            self.size = shape[2], shape[1]

    def batches(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """All pictures, as in `PictureSource`."""
        with self._opened() as (member, shape):
            for start in range(0, self.count, batch_size):
                rows = min(batch_size, self.count - start)
                content = member.read(rows * prod(shape[1:]))
                if len(content) < rows * prod(shape[1:]):
                    raise EOFError(f"{PICTURES_KEY} ends before its {self.count} pictures")
                values = np.frombuffer(content, dtype=np.uint8)
                yield values.reshape(rows, *shape[1:])

    @contextmanager
    def _opened(self) -> Generator[tuple[IO[bytes], tuple[int, ...]]]:
        try:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(f"{PICTURES_KEY}.npy") as member,
            ):
                yield member, self._shape(member)
        except (*_UNREADABLE, KeyError, EOFError, zlib.error) as error:
            raise ValueError(f"{str(self.path)!r} cannot be read: {error}") from error

    def _shape(self, member: IO[bytes]) -> tuple[int, ...]:
        try:
            reader: Any = _READ_HEADER[np.lib.format.read_magic(member)]
            shape, fortran_order, dtype = reader(member)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{str(self.path)!r}: {PICTURES_KEY} is no .npy array") from error
        if fortran_order or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(
                f"{str(self.path)!r}: {PICTURES_KEY} is {dtype} of shape {shape}, it must be uint8"
                " of shape (pictures, height, width, 3)"
            )
        return shape


def npz_keys(path: Path) -> frozenset[str]:
    """Names of the arrays in an `.npz` file.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read as one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except _UNREADABLE as error:
        raise ValueError(f"{str(path)!r} cannot be read as an .npz file: {error}") from error
