"""Saving pictures: nothing is overwritten silently, nothing is left half-written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .metadata import png_text


def picture_path(folder: str | Path, index: int, seed: int) -> Path:
    """The file of one picture, for example `00003-42.png`.

    Args:
        folder: Folder of the pictures.
        index: Number of the picture in its run, from 0.
        seed: Seed of the picture.
    """
    return Path(folder) / f"{index:05d}-{seed}.png"


def next_index(folder: str | Path) -> int:
    """The number after the highest one of a picture in a folder.

    Args:
        folder: Where `picture_path` puts pictures; it need not exist.
    """
    names = (path.name.partition("-")[0] for path in Path(folder).glob("*-*.png"))
    return max((int(name) + 1 for name in names if name.isdecimal()), default=0)


def check_folder(folder: str | Path, argument: str = "out") -> Path:
    """Create a folder for pictures if it does not exist.

    Args:
        folder: The folder.
        argument: Name of the argument that gave it, for messages.

    Returns:
        The folder.

    Raises:
        ValueError: The path is a file, or nothing can be written there.
    """
    path = check_place(folder, argument)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}={str(path)!r} cannot be made: {error.strerror}") from error
    return path


def check_place(folder: str | Path, argument: str = "out") -> Path:
    """Like `check_folder`, but create nothing yet.

    Args:
        folder: The folder.
        argument: Name of the argument that gave it, for messages.

    Returns:
        The folder.

    Raises:
        ValueError: As in `check_folder`.
    """
    path = Path(folder)
    nearest = Path(os.path.abspath(path))
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{argument}={str(path)!r} is or lies below a file: name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}={str(path)!r} is not writable: name another folder")
    return path


def check_free(paths: Sequence[Path], overwrite: bool = False) -> None:
    """Raise an error if pictures would overwrite files.

    Args:
        paths: Files that will be written.
        overwrite: Whether existing files may be replaced.

    Raises:
        ValueError: A path is a folder.
        FileExistsError: A file exists and `overwrite` is False.
    """
    for path in paths:
        if path.is_dir():
            raise ValueError(f"out={str(path)!r} is a folder: name a file")
    taken = [path for path in paths if os.path.lexists(path)]
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise FileExistsError(
            f"out: {str(taken[0])!r} exists{more}: choose another place, or overwrite it"
            " with overwrite=True"
        )


def check_samples_path(out: str | Path, overwrite: bool = False) -> Path:
    """Check the file of samples; create nothing yet.

    Args:
        out: The `.npz` file.
        overwrite: Whether it and the PNG file beside it may be replaced.

    Returns:
        The file.

    Raises:
        ValueError: It does not end in `.npz`, or cannot be written.
        FileExistsError: It exists, no unfinished run is beside it, and `overwrite` is False.
    """
    path = Path(os.path.expanduser(out))
    if path.suffix != ".npz":
        raise ValueError(f"out={str(out)!r} must end in .npz")
    check_place(path.parent)
    # A run that was killed may have written the files already, just before it was done.
    check_free([path, grid_path(path)], overwrite or parts_folder(path).is_dir())
    return path


def parts_folder(out: Path) -> Path:
    """The folder of an unfinished run's batches.

    Args:
        out: The `.npz` file.
    """
    return out.with_name(out.name + ".parts")


def grid_path(out: Path) -> Path:
    """The PNG file that shows the first samples.

    Args:
        out: The `.npz` file.
    """
    return out.with_suffix(".png")


def save_png(
    image: Image.Image,
    path: str | Path,
    record: Mapping[str, Any] | str,
    overwrite: bool = False,
) -> None:
    """Write a picture; the file appears complete or not at all.

    Args:
        image: The picture.
        path: The PNG file; its folder exists.
        record: How it was made; see `read_record`. If it is a text from `format_parameters`, only
            `read_parameters` can read it.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
    """
    with whole_file(path, overwrite=overwrite) as file:
        image.save(file, format="PNG", pnginfo=png_text(record))


@contextmanager
def whole_file(
    path: str | Path, *, folder: str | Path | None = None, overwrite: bool = True
) -> Generator[IO[bytes]]:
    """A file to write; it appears under its name, complete, if the block raises nothing.

    Args:
        path: The file; its folder is created if it does not exist.
        folder: Its folder until it is complete, in the same file system; `None` is that of `path`.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
        OSError: It cannot be written, for example because the disk is full.
    """
    path = Path(path)
    part = Path(folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.part"
    for each in {part.parent, path.parent}:
        each.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            # Otherwise, after a power failure, a file could have its name and no content.
            os.fsync(file.fileno())
        if overwrite:
            os.replace(part, path)
        else:
            _move_without_overwriting(part, path)
    finally:
        part.unlink(missing_ok=True)


def _move_without_overwriting(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        check_free([path])
        raise
    except OSError:  # a file system without hard links
        check_free([path])
        os.replace(part, path)
