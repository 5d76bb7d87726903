"""Pictures that visitors upload, each as its original file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

MOST_BYTES = "30mb"
_MOST_PIXELS = 50_000_000


def upload(label: str, visible: bool = True) -> gr.Image:
    """An upload for a picture of the visitor's; its value is the path of the uploaded file.

    Args:
        label: What the picture is for.
        visible: Whether visitors see it.
    """
    place: Any = gr.Image(
        label=label,
        visible=visible,
        type="filepath",
        image_mode=None,
        sources=["upload"],
        height=180,
        min_width=120,
    )
    fetch = place.async_move_resource_to_block_cache

    async def without_fetching(path: str | Path | None) -> str | None:
        if "://" in str(path):
            raise gr.Error("Upload a picture's file instead of its address.", print_exception=False)
        return await fetch(path)

    # Not a subclass: gradio would write a file next to its source.
    place.async_move_resource_to_block_cache = without_fetching
    place.preprocess = _checked
    return place


def _checked(payload: Any) -> str | None:
    """The path of an uploaded file, checked to be a picture that can be read."""
    if payload is None:
        return None
    # gradio's own check skips a payload that is not marked as a file.
    if not Path(payload.path or "").resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("The picture was not uploaded.", print_exception=False)
    try:
        with Image.open(payload.path) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow raises all kinds of errors for what it cannot read
        message = f"{payload.orig_name or 'The file'} is no picture that can be read."
        raise gr.Error(message, print_exception=False) from error
    if width * height > _MOST_PIXELS:
        message = f"{width}x{height} pixels are too many: the limit is {_MOST_PIXELS:,}."
        raise gr.Error(message, print_exception=False)
    return payload.path
