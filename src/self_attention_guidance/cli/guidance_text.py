"""A guidance as text on the command line, "sag:scale=0.5,blur_sigma=2", to its settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

_NUMBERS = {float: "a number", int: "a whole number"}
_TRUTH = {"true": True, "false": False}


def guidance_of(
    texts: Sequence[str], options: dict[str, Any], has_scale: bool = False
) -> dict[str, Any]:
    """The settings of guidance that a command line gives.

    Args:
        texts: Of `--guidance`; at most one.
        options: Settings that options of their own gave, by their names.
        has_scale: Whether such an option gives the scale, which is no setting of the model.

    Returns:
        What `Guidance.from_dict` takes; without "method" where no guidance was named.

    Raises:
        ValueError: There are several guidances, one is unknown, or a setting is unknown, given
            twice or outside its range.
    """
    if len(texts) > 1:
        raise ValueError(f"guidance was given {len(texts)} times: give one")
    named = parse_guidance(texts[0]) if texts else {}
    for name in named.keys() & {*options, *(["scale"] if has_scale else [])}:
        raise ValueError(f"{name} was given twice: by --guidance and by an option of its own")
    given = {**named, **options}

    from ..guidance import Guidance

    Guidance.from_dict({"method": "sag", **given})
    return given


def parse_guidance(text: str) -> dict[str, Any]:
    """Reads a guidance like "pag" or "sag:scale=0.5,blur_sigma=2".

    "none" stands for `None`, and a plus sign is between layers where a setting takes several.

    Args:
        text: A short name; behind a colon, settings with their values, separated by commas.

    Returns:
        The settings that it gives, and the short name as "method".

    Raises:
        ValueError: A name is unknown, or a value is not of its type.
    """
    from ..guidance import METHODS

    method, colon, rest = text.partition(":")
    method = method.strip().lower()
    if method not in METHODS:
        raise ValueError(f"guidance={text!r}: {_unknown(method, METHODS, 'guidance')}")
    kinds = get_type_hints(METHODS[method])
    known = [setting.name for setting in fields(METHODS[method])]
    given: dict[str, Any] = {"method": method}
    for part in rest.split(",") if colon else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"guidance={text!r}: {part!r} must be NAME=VALUE")
        if name not in known:
            raise ValueError(f"guidance={text!r}: {_unknown(name, known, f'setting of {method}')}")
        if name in given:
            raise ValueError(f"guidance={text!r}: {name} was given twice")
        given[name] = _value(name, value, kinds[name])
    return given


def _value(name: str, text: str, kind: Any) -> Any:
    """A text as a value of a field's type."""
    kinds = [kind] if get_origin(kind) in (None, Sequence) else list(get_args(kind))
    if type(None) in kinds and text == "none":
        return None
    for number, rule in _NUMBERS.items():
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                raise ValueError(f"{name}={text!r} must be {rule}") from None
    if bool in kinds:
        if text not in _TRUTH:
            raise ValueError(f"{name}={text!r} must be true or false")
        return _TRUTH[text]
    is_list = any(get_origin(each) is Sequence for each in kinds)
    return text.split("+") if is_list else text


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name!r} is no {kind}; {hint}There are {', '.join(names)}"
