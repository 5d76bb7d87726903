"""A guidance as the text of the command line, such as "sag:scale=0.5,blur_sigma=2"."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from ..checks import parse_number
from .base import METHODS

PLUS = " + "
"""The text between guidances that act together."""

_NONE = "none"  # no guidance
_NUMBERS = {float: "a number", int: "a whole number"}
_TRUTH = {"true": True, "false": False}


def settings_of(
    texts: Sequence[str], options: Mapping[str, Any], has_scale: bool = False
) -> dict[str, Any]:
    """The settings of guidance that a command line gives, checked.

    Args:
        texts: Values of `--guidance`; several act together. "none" alone is a scale of 0.
        options: Settings from their own options, by name.
        has_scale: Whether an option of its own gives the scale.

    Returns:
        Arguments of `Guidance.from_dict`; without "method" if no guidance was named.

    Raises:
        ValueError: A guidance is unknown, or a setting is unknown, given twice or outside its
            range.
    """
    if [text.strip().lower() for text in texts] == [_NONE]:
        for name in [*options, *(["sag_scale"] if has_scale else [])]:
            raise ValueError(f"{name} must not be given with --guidance {_NONE}")
        return {"scale": 0.0}
    given = parse_guidance(PLUS.join(texts)) if texts else {}
    if "guidances" in given:
        for name in options:
            raise ValueError(f"{name} of which guidance? Give it inside --guidance")
        return given
    for name in given.keys() & {*options, *(["scale"] if has_scale else [])}:
        raise ValueError(f"{name} was given twice: by --guidance and by an option of its own")
    settings: dict[str, Any] = {"method": "sag", **given, **options}
    method = settings.pop("method")
    known = _names(method)
    for name in options:
        if name not in known:
            reason = _unknown(name, known, f"setting of {method}")
            raise ValueError(f"{name}={options[name]!r}: {reason}")
    METHODS[method](**settings)
    return {**given, **options}


def check_methods(names: Sequence[str]) -> None:
    """Refuse unknown methods, and one that is given twice.

    Args:
        names: Short names.

    Raises:
        ValueError: One is unknown, or given twice.
    """
    for number, name in enumerate(names):
        if name not in METHODS:
            raise ValueError(f"methods={','.join(names)!r}: {_unknown(name, METHODS, 'guidance')}")
        if name in names[:number]:
            raise ValueError(f"methods={','.join(names)!r}: {name} was given twice")


def parse_guidance(text: str) -> dict[str, Any]:
    """Read a guidance like "pag" or "sag:scale=0.5,blur_sigma=2 + pag".

    "none" stands for `None`. Plus signs separate several layers of a setting.

    Args:
        text: A short name; after a colon, settings with their values, separated by commas. A plus
            sign with a space on both sides separates guidances that act together.

    Returns:
        The settings, with the short name as "method"; of several guidances, their settings as
        "guidances".

    Raises:
        ValueError: A name is unknown, or a value is not of its type or outside its range.
    """
    parts = _parts(text)
    if len(parts) > 1:
        several = [parse_guidance(part) for part in parts]
        return {"method": "+".join(each["method"] for each in several), "guidances": several}
    method, named = _split(text)
    cls = METHODS[method]
    kinds = get_type_hints(cls)
    try:
        settings = {name: _value(name, value, kinds[name]) for name, value in named.items()}
        cls(**settings)
    except ValueError as error:
        raise ValueError(f"guidance={text!r}: {error}") from None
    return {"method": method, **settings}


def _parts(text: str) -> list[str]:
    """The guidances of a text; a plus sign without spaces may separate layers."""
    return [part.strip() for part in text.split(PLUS if ":" in text else "+")]


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The method and the settings of a text, checked to be known."""
    method, colon, rest = text.partition(":")
    method = method.strip().lower()
    if method not in METHODS:
        raise ValueError(f"guidance={text!r}: {_unknown(method, METHODS, 'guidance')}")
    known = _names(method)
    given: dict[str, str] = {}
    if any("=" in part.partition("=")[2] for part in rest.split(",")) or ";" in rest:
        raise ValueError(f"guidance={text!r}: its settings must be separated by commas")
    for part in rest.split(",") if colon else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            hint = f", such as scale={name}" if _is_number(name) else ""
            raise ValueError(f"guidance={text!r}: {part!r} must be NAME=VALUE{hint}")
        if name not in known:
            reason = _unknown(name, known, f"setting of {method}")
            raise ValueError(f"guidance={text!r}: {reason}")
        if name in given:
            raise ValueError(f"guidance={text!r}: {name} was given twice")
        given[name] = value
    return method, given


def _value(name: str, text: str, kind: Any) -> Any:
    """A value of a field's type, read from a text."""
    kinds = [kind] if get_origin(kind) in (None, Sequence) else list(get_args(kind))
    if type(None) in kinds and text == "none":
        return None
    for number, rule in _NUMBERS.items():
        if number in kinds:
            try:
                return parse_number(text, number)
            except ValueError:
                raise ValueError(f"{name}={text!r} must be {rule}") from None
    if bool in kinds:
        if text not in _TRUTH:
            raise ValueError(f"{name}={text!r} must be true or false")
        return _TRUTH[text]
    is_list = any(get_origin(each) is Sequence for each in kinds)
    return text.split("+") if is_list else text


def _is_number(text: str) -> bool:
    try:
        parse_number(text, float)
    except ValueError:
        return False
    return True


def _names(method: str) -> list[str]:
    return [each.name for each in dataclasses.fields(METHODS[method])]


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    return f"{name!r} is no {kind}; {hint} are {', '.join(names)}"


def guidance_text(settings: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """Write a guidance as `--guidance` takes it, without settings that have their defaults.

    Args:
        settings: What `Guidance.to_dict` returned; the scale may be missing, and is left out then.
        always: Names of settings to write even if they have their defaults, because a model
            recommends other values. They do not apply to several guidances.
    """
    if "guidances" in settings:
        return PLUS.join(guidance_text(_scaled(each, settings)) for each in settings["guidances"])
    method = settings["method"]
    usual = METHODS[method]().to_dict()
    changed = [
        name
        for name, value in settings.items()
        if name != "scale" and (value != usual[name] or name in always)
    ]
    names = ["scale", *changed] if "scale" in settings else changed
    texts = [f"{name}={_text_of(settings[name])}" for name in names]
    return f"{method}:{','.join(texts)}" if texts else method


def _scaled(part: Mapping[str, Any], several: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in part.items() if name != "scale"}
    return {**rest, "scale": part["scale"] * several["scale"]} if "scale" in several else rest


def _text_of(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "none" if value is None else str(value)
