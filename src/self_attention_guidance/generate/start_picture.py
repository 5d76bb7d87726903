"""Image to image and inpainting: the picture that drawing begins with. No heavy import."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .as_seen import FORMATS, as_seen
from .settings import GenerationSettings


def check_start(settings: GenerationSettings, max_size: int | None = None) -> None:
    """Refuse a start picture or a mask that can't be read; needs no model.

    Args:
        settings: Settings of the pictures.
        max_size: Largest side, in pixels; `None` is no limit.

    Raises:
        ValueError: A file is missing or no picture, or the start picture is too large to draw in
            its own size.
    """
    for name in ("image", "mask"):
        path = getattr(settings, name)
        if path is None:
            continue
        with _opened(name, path) as image:
            width, height = image.size
        sides = ((width, settings.width), (height, settings.height)) if name == "image" else ()
        own = [side for side, chosen in sides if chosen is None]
        if max_size is not None and max(own, default=0) > max_size:
            raise ValueError(
                f"image={path!r} has {width}x{height} pixels, and a side must have at most"
                f" {max_size}: choose the size to draw"
            )


def start_arguments(settings: GenerationSettings, multiple: int, count: int) -> dict[str, Any]:
    """The extra arguments of a call that begins with a picture; empty if it does not.

    Args:
        settings: Settings of the pictures.
        multiple: Number that must divide the sides.
        count: Pictures in the batch; all begin with the same one.

    Returns:
        The picture and its mask, cut to the size to draw: that of the settings, else the
        picture's own size, rounded down.
    """
    if settings.image is None:
        return {}
    picture = _read("image", settings.image)
    own = [max(multiple, side // multiple * multiple) for side in picture.size]
    size = settings.width or own[0], settings.height or own[1]
    found: dict[str, Any] = {"width": size[0], "height": size[1], "strength": settings.strength}
    found["image"] = [ImageOps.fit(picture, size)] * count
    if settings.mask is not None:
        mask = _read("mask", settings.mask).convert("L")
        found["mask_image"] = [ImageOps.fit(mask, size)] * count
    return found


def digests(settings: GenerationSettings) -> dict[str, str]:
    """Digests that identify a start picture and a mask, by "image" and "mask".

    Raises:
        ValueError: A file can't be read, or is there no longer.
    """
    paths = {"image": settings.image, "mask": settings.mask}
    found: dict[str, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        try:
            status = Path(path).stat()
            found[name] = _digest(path, status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise ValueError(f"{name}={path!r} cannot be read: {error.strerror}") from error
    return found


@lru_cache
def _digest(path: str, modified: int, size: int) -> str:
    """Digest of a file's content, cached as many rows of a list may begin with one picture."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _read(name: str, path: str) -> Image.Image:
    """A picture in RGB, as viewers show it."""
    with _opened(name, path) as image:
        try:
            return as_seen(image)
        except ValueError as error:
            raise ValueError(f"{name}={path!r}: {error}") from error
        except Exception as error:  # each format has its own errors for damaged files
            raise ValueError(f"{name}={path!r} is no picture that can be read") from error


def _opened(name: str, path: str) -> Image.Image:
    """A picture whose pixels are not read yet."""
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise ValueError(f"{name}={path!r} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}={path!r} is too large: {error}") from error
    except Exception as error:  # each format has its own errors for damaged files
        raise ValueError(f"{name}={path!r} is no picture that can be read") from error
