"""A guidance as a text that the command line reads, such as "sag:scale=0.5,blur_sigma=2"."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .base import METHODS

PLUS = " + "
"""The text between guidances that act together."""


def guidance_text(settings: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """Write a guidance as `--guidance` takes it, without settings that have their defaults.

    Args:
        settings: What `Guidance.to_dict` returned.
        always: Names of settings to write even if they have their defaults, because a model
            recommends other values. They do not apply to several guidances.
    """
    if "guidances" in settings:
        factor = settings["scale"]
        parts = [{**each, "scale": each["scale"] * factor} for each in settings["guidances"]]
        return PLUS.join(map(guidance_text, parts))
    method = settings["method"]
    usual = METHODS[method]().to_dict()
    changed = [
        name
        for name, value in settings.items()
        if name != "scale" and (value != usual[name] or name in always)
    ]
    texts = [f"{name}={_text_of(settings[name])}" for name in ("scale", *changed)]
    return f"{method}:{','.join(texts)}"


def _text_of(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
