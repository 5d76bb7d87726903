"""Settings as text in the form that Stable Diffusion web interfaces write into pictures.

The prompt, then a line `Negative prompt: ...`, then one line `Steps: 25, Sampler: DDIM, ...`.
A value that holds a comma, a colon or a line break is written as a JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import __version__

PARAMETERS_KEY = "parameters"

_NEGATIVE = "Negative prompt: "
_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a picture's `parameters` text says.

    Attributes:
        prompt: What was asked for; may have several lines, may be empty.
        negative_prompt: What was asked against; may be empty.
        settings: Names and values of the last line, in order.
    """

    prompt: str
    negative_prompt: str
    settings: Mapping[str, str]


def format_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, Any]) -> str:
    """Writes settings in the web interfaces' form.

    Args:
        prompt: What was asked for.
        negative_prompt: What was asked against; its line is left out if empty.
        settings: Names and values in order; floats are written in their shortest form and
            `None` is left out.

    Returns:
        The text of a PNG's `parameters` chunk.
    """
    negative = [_NEGATIVE + negative_prompt] if negative_prompt else []
    written = {name: _written(value) for name, value in settings.items() if value is not None}
    fields = ", ".join(f"{name}: {value}" for name, value in written.items())
    return "\n".join([prompt, *negative, fields])


def parse_parameters(text: str) -> Parameters:
    """Reads text in the web interfaces' form.

    Args:
        text: As `format_parameters` writes it.

    Returns:
        Prompt, negative prompt and settings, the latter as texts.
    """
    *lines, fields = text.split("\n")
    settings = {name: _read(value.strip()) for name, value in _FIELD.findall(fields)}
    starts = [number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)]
    split = starts[0] if starts else len(lines)
    negative = "\n".join(lines[split:]).removeprefix(_NEGATIVE)
    return Parameters(prompt="\n".join(lines[:split]), negative_prompt=negative, settings=settings)


def png_text(parameters: str) -> PngInfo:
    """A PNG's text chunk: `tEXt` if Latin-1 can hold the text, else `iTXt` in UTF-8.

    Args:
        parameters: As `format_parameters` writes it.

    Returns:
        For the `pnginfo` argument of Pillow's `Image.save`.
    """
    info = PngInfo()
    try:
        parameters.encode("latin-1")
        info.add_text(PARAMETERS_KEY, parameters)
    except UnicodeEncodeError:
        info.add_itxt(PARAMETERS_KEY, parameters)
    return info


def read_parameters(path: str | Path) -> Parameters:
    """Reads the settings that a picture was made with.

    Args:
        path: A PNG file.

    Returns:
        Prompt, negative prompt and settings.

    Raises:
        ValueError: The file has no `parameters` text.
    """
    with Image.open(path) as image:
        image.load()
        text: object = image.info.get(PARAMETERS_KEY)
    if not isinstance(text, str):
        raise ValueError(f"path={str(path)!r} has no {PARAMETERS_KEY!r} text")
    return parse_parameters(text)


def version_label() -> str:
    """Name and version of this package, as the metadata's `Version` has it."""
    return f"self-attention-guidance {__version__}"


def _written(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _read(value: str) -> str:
    return json.loads(value) if value.startswith('"') else value
