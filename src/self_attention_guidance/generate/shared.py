"""What the pictures of a grid have in common, and the guidances that they were drawn with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..guidance import METHODS
from .metadata import Record, written

# Of one picture, or of its batch.
_OF_ONE = ("prompt", "together")


def shared_record(records: Sequence[Mapping[str, Any]]) -> Record:
    """The entries that are the same in all records of pictures, and their guidance.

    Args:
        records: At least one. Pictures without guidance say nothing of its other settings.

    Returns:
        The entries; without "guidance" if there are several methods.
    """
    found = _common([_without(each, (*_OF_ONE, "guidance")) for each in records])
    guidance = shared_guidance(records)
    return found | ({"guidance": guidance} if guidance else {})


def shared_guidance(records: Sequence[Mapping[str, Any]]) -> Record:
    """The settings of guidance that all pictures have in common; empty for several methods.

    Args:
        records: The pictures' records, at least one.
    """
    of_all = [each["guidance"] for each in records]
    if len({each["method"] for each in of_all}) > 1:
        return {}
    found = _common([each for each in of_all if each["scale"]] or of_all)
    has_one_scale = len({each["scale"] for each in of_all}) == 1
    return found if has_one_scale else _without(found, ("scale",))


def guidance_line(guidance: Mapping[str, Any], heading: str, default_layer: str = "") -> str:
    """A guidance for readers: "sag: scale=4, every=3", without settings that have their defaults.

    Args:
        guidance: What `shared_guidance` returned.
        heading: Its name in the grid. Settings that this holds are left out.
        default_layer: The layer that "default" means in the grid, if it is to be shown.
    """
    if not guidance.get("scale", 1):
        return f"{heading}: no guidance"
    parts: Sequence[Mapping[str, Any]] = guidance.get("guidances", [guidance])
    if len(parts) > 1:
        texts = [f"{each['method']} {', '.join(_changed(each))}" for each in parts]
        factor = guidance.get("scale", 1)
        if ":" in heading:  # all of its settings follow
            heading = " + ".join(each["method"] for each in parts)
        text = " + ".join(texts) + (f", all times {written(factor)}" if factor != 1 else "")
    else:
        named = set(re.findall(r"(\w+)=", heading))
        is_named = heading.lower().startswith(guidance["method"])
        settings = [] if is_named else [guidance["method"]]
        settings += [each for each in _changed(guidance) if each.partition("=")[0] not in named]
        text = ", ".join(settings) or ("otherwise defaults" if named else "defaults")
    return f"{heading}: {text}" + (f", default layer={default_layer}" if default_layer else "")


def layers_of(guidance: Mapping[str, Any]) -> str:
    """Short names of the layers that a guidance names, with plus signs between them.

    Args:
        guidance: Settings of one or several guidances.
    """
    parts = guidance.get("guidances", [guidance])
    found = (_text_of(name, part.get(name)) for part in parts for name in ("layer", "layers"))
    return "+".join(dict.fromkeys(filter(None, found)))


def _changed(guidance: Mapping[str, Any]) -> list[str]:
    """The scale and the settings that differ from the method's defaults."""
    usual = METHODS[guidance["method"]]().to_dict()
    return [
        f"{name}={_text_of(name, value)}"
        for name, value in guidance.items()
        if name == "scale" or value != usual[name]
    ]


def _text_of(name: str, value: Any) -> str:
    if name not in ("layer", "layers"):
        return written(value)
    from ..denoiser.layers import short_name  # it imports torch

    names = [value] if isinstance(value, str) else cast("Sequence[str]", value or ())
    return "+".join(map(short_name, names))


def _without(entries: Mapping[str, Any], names: Sequence[str]) -> Record:
    return {name: value for name, value in entries.items() if name not in names}


def _common(mappings: Sequence[Mapping[str, Any]]) -> Record:
    """The entries that all have, with the same values; of objects, their common entries."""
    found: Record = {}
    for name, value in mappings[0].items():
        values = [each[name] for each in mappings if name in each]
        if len(values) < len(mappings):
            continue
        if all(each == value for each in values):
            found[name] = value
        elif all(isinstance(each, Mapping) for each in values):
            found[name] = _common(values)
        elif name == "guidances":  # of the same method, so the parts are as well
            found[name] = [_common(parts) for parts in zip(*values, strict=True)]
    return found
