"""Settings in files: as text for web interfaces and as JSON for this package.

The text is what Stable Diffusion web interfaces write into pictures: the prompt, then a line
`Negative prompt: ...`, then one line `Steps: 25, Sampler: DDIM, ...`. A value that holds a comma, a
colon or a line break is written as a JSON string. The JSON is a record, see `record`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..guidance.text import guidance_text
from .schedulers import label_of

Record = dict[str, Any]

PARAMETERS_KEY = "parameters"
RECORD_KEY = "sag_settings"

# Left out of the text if they are `None`, which means no limit.
_NO_LIMIT = ("noise_from", "noise_to", "norm_limit")
# Names in extensions of the web interfaces, and the settings that switch methods on. Extensions for
# PAG and SEG count steps instead of fractions.
_WEB_NAMES = {"SAG Scale": "SAG Guidance Scale", "SAG Threshold": "SAG Mask Threshold"}
_WEB_SWITCHES = {"sag": "SAG Guidance Enabled", "pag": "PAG Active", "seg": "SEG Active"}
_COUNT_STEPS = ("pag", "seg")
_NEGATIVE = "Negative prompt: "
_FIELD = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The content of a picture's `parameters` text.

    Attributes:
        prompt: The prompt; may have several lines, may be empty.
        negative_prompt: The negative prompt; may be empty.
        settings: Names and values of the last line, in order.
    """

    prompt: str
    negative_prompt: str
    settings: Mapping[str, str]


def format_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, Any]) -> str:
    """Format settings like the web interfaces.

    Args:
        prompt: The prompt.
        negative_prompt: The negative prompt; its line is left out if empty.
        settings: Names and values in order; floats are written in their shortest form and
            `None` is left out.

    Returns:
        The text of a PNG's `parameters` chunk.
    """
    negative = [_NEGATIVE + negative_prompt] if negative_prompt else []
    fields = ", ".join(
        f"{name}: {_quoted(written(value))}"
        for name, value in settings.items()
        if value is not None
    )
    return "\n".join([prompt, *negative, fields])


def parse_parameters(text: str) -> Parameters:
    """Parse text of the web interfaces.

    Args:
        text: Text in the format of `format_parameters`.

    Returns:
        Prompt, negative prompt and settings, the latter as texts.
    """
    *lines, fields = text.split("\n")
    settings = {name: _read(value.strip()) for name, value in _FIELD.findall(fields)}
    starts = [number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)]
    split = starts[0] if starts else len(lines)
    negative = "\n".join(lines[split:]).removeprefix(_NEGATIVE)
    return Parameters(prompt="\n".join(lines[:split]), negative_prompt=negative, settings=settings)


def text_of(record: Mapping[str, Any]) -> str:
    """A record as text for web interfaces, with all its other settings, too.

    Args:
        record: The record of a picture, or of a grid, which has only what its pictures share.
    """
    settings = dict(record["settings"])
    guidance = dict(record.get("guidance", {}))
    if "sag_scales" in record:
        guidance["scale"] = record["sag_scales"]
    negative = settings.pop("negative_prompt", "")
    steps: int | None = settings.pop("num_inference_steps", None)
    seed: Any = record.get("seed")
    rows = record.get("num_images", 1)
    acts = record.get("weakened_predictions") != 0
    named = {
        "Steps": steps,
        "Sampler": label_of(record["scheduler"], record["scheduler_config"]),
        "CFG scale": settings.pop("guidance_scale", None),
        "Seed": seed if rows == 1 else list(range(seed, seed + rows)),
        "Size": "{}x{}".format(*record["size"]),
        "Model": record.get("model"),
        **(_guidance_fields(guidance, steps, acts) if guidance else {}),
    }
    others = {
        **{n: v for n, v in settings.items() if n not in ("width", "height") and v != []},
        "class_names": record.get("class_names"),
        "classifier": record.get("networks", {}).get("classifier"),
        "loras": " + ".join(f"{path}:{scale:g}" for path, scale in record.get("loras", [])) or None,
        "weakened_predictions": record.get("weakened_predictions"),
        "guidances": _guidances_text(record.get("guidances", [])),
        "rows": record.get("rows"),
        "columns": record.get("columns"),
        "dtype": record["dtype"],
        "version": record["version"],
    }
    named |= {name.replace("_", " ").capitalize(): value for name, value in others.items()}
    prompt = "\n".join(record.get("prompts", [record.get("prompt", "")]))
    return format_parameters(prompt, negative, named)


def method_label(method: str) -> str:
    """The name of a guidance for readers, such as "SAG".

    Args:
        method: Its short name.
    """
    names = method.split("+")
    return "+".join(name.upper() if len(name) <= 3 else name.capitalize() for name in names)


def png_text(record: Mapping[str, Any] | str) -> PngInfo:
    """A PNG's text chunks: `tEXt` if Latin-1 can hold a text, else `iTXt` in UTF-8.

    Args:
        record: The record, written as text and as JSON. A text is written as it is, without JSON.

    Returns:
        The chunks for the `pnginfo` argument of Pillow's `Image.save`.
    """
    info = PngInfo()
    parameters = record if isinstance(record, str) else text_of(record)
    try:
        parameters.encode("latin-1")
        info.add_text(PARAMETERS_KEY, parameters)
    except UnicodeEncodeError:
        info.add_itxt(PARAMETERS_KEY, parameters)
    if not isinstance(record, str):
        info.add_text(RECORD_KEY, json.dumps(record))
    return info


def read_parameters(path: str | Path) -> Parameters:
    """Read the settings of a picture, as a web interface does.

    Args:
        path: A PNG file.

    Returns:
        Prompt, negative prompt and settings.

    Raises:
        ValueError: The file has no `parameters` text.
    """
    return parse_parameters(read_text(path))


def read_text(path: str | Path) -> str:
    """Read the text that web interfaces show for a picture.

    Args:
        path: A PNG file.

    Raises:
        ValueError: The file has no `parameters` text.
    """
    return _png_chunk(path, PARAMETERS_KEY)


def read_record(path: str | Path) -> Record:
    """Read the record of a picture or of a file of samples, which is enough to draw it again.

    Args:
        path: A PNG file, or a `.npz` file that `SampleJob` wrote.

    Raises:
        ValueError: The file has no record.
    """
    text = (_npz_text if Path(path).suffix == ".npz" else _png_chunk)(path, RECORD_KEY)
    try:
        record: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r}: its {RECORD_KEY!r} text is damaged") from error
    if not isinstance(record, dict):
        raise ValueError(f"path={str(path)!r}: its {RECORD_KEY!r} text must be a JSON object")
    return cast("Record", record)


def _npz_text(path: str | Path, key: str) -> str:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays[key].item())
    except FileNotFoundError:
        raise
    except KeyError:
        raise ValueError(f"path={str(path)!r} has no {key!r} text") from None
    except Exception as error:  # numpy raises all kinds of errors for what is no such archive
        raise ValueError(f"path={str(path)!r} is no .npz file") from error


def _png_chunk(path: str | Path, key: str) -> str:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text: object = image.info.get(key)
    except UnidentifiedImageError:
        raise ValueError(f"path={str(path)!r} is no PNG picture") from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"path={str(path)!r} cannot be read: {reason}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"path={str(path)!r} is too large: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"path={str(path)!r} has no {key!r} text")
    return text


def written(value: object) -> str:
    """A setting as text: floats in their shortest form, lists separated by commas.

    Args:
        value: The setting.
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value))
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def version_label() -> str:
    """Name and version of this package, for `Version` in the metadata."""
    return f"self-attention-guidance {__version__}"


def _guidance_fields(guidance: Mapping[str, Any], steps: int | None, acts: bool) -> dict[str, Any]:
    """All settings of a guidance, "SAG Blur Sigma" and so on; a grid may have no one `steps`."""
    method = guidance["method"]
    fields: dict[str, Any] = {"Guidance Method": method}
    if "guidances" in guidance:
        fields["Guidance Scale"] = guidance.get("scale")
    for number, part in enumerate(guidance.get("guidances", [guidance])):
        own = part["method"]
        before = [each["method"] for each in guidance.get("guidances", [])[:number]]
        again = f" {before.count(own) + 1}" if own in before else ""
        for setting, value in part.items():
            if setting == "method" or (setting in _NO_LIMIT and value is None):
                continue
            words = setting.removeprefix(f"{own}_").replace("_", " ").title()
            name = f"{method_label(own)}{again} {words}"
            fields[_WEB_NAMES.get(name, name)] = "default" if value is None else value
        scale = part.get("scale", True)  # of grids with several, it is left out
        is_on = any(cast("list[float]", scale)) if isinstance(scale, list) else scale
        if again or not acts or not is_on:
            continue
        if own in _WEB_SWITCHES:
            fields[_WEB_SWITCHES[own]] = True
        if own in _COUNT_STEPS and steps is not None and {"start", "stop"} <= part.keys():
            begin, end = (math.ceil(part[name] * steps - 1e-9) for name in ("start", "stop"))
            fields |= {f"{own.upper()} Start Step": begin, f"{own.upper()} End Step": end - 1}
    return fields


def _guidances_text(guidances: Sequence[Mapping[str, Any] | None]) -> str | None:
    """Each guidance of a grid that has several, as `--guidance` takes it."""
    texts = ["none" if each is None else guidance_text(each) for each in guidances]
    return " | ".join(texts) or None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _read(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:  # it was written by another program
        return value
