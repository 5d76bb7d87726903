"""A guidance as text, "sag:scale=0.5,blur_sigma=2", as the command line reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .base import METHODS

PLUS = " + "
"""What stands between guidances that act together."""


def guidance_text(settings: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """A guidance as `--guidance` takes it, without the settings that have their defaults.

    Args:
        settings: What `Guidance.to_dict` gave.
        always: Names of settings that are told though they have their defaults, because a model
            recommends others. Of several guidances there are none.
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
    told = [f"{name}={_told(settings[name])}" for name in ("scale", *changed)]
    return f"{method}:{','.join(told)}"


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
