"""Reading the settings of a guidance from text like "sag:scale=0.5,blur_sigma=2"."""

from __future__ import annotations

import ast
import collections.abc
import copy
import dataclasses
import difflib
import functools
import math
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .. import checks

_NUMBERS = {float: "a number", int: "a whole number"}
_PLUS = " + "
_TRUTH = {"true": True, "false": False}


def guidance_of(
    texts: Sequence[str], options: Mapping[str, Any], has_scale: bool = False
) -> dict[str, Any]:
    """The settings of guidance that a command line gives, checked without any heavy import.

    Args:
        texts: Values of `--guidance`; several act together.
        options: Settings from their own options, by name.
        has_scale: Whether an option of its own gives the scale.

    Returns:
        Arguments of `Guidance.from_dict`; without "method" if no guidance was named.

    Raises:
        ValueError: A guidance is unknown, or a setting is unknown, given twice or outside its
            range.
    """
    given = parse_guidance(_PLUS.join(texts)) if texts else {}
    if "guidances" in given:
        for name in options:
            raise ValueError(f"{name} of which guidance? Give it inside --guidance")
        return given
    for name in given.keys() & {*options, *(["scale"] if has_scale else [])}:
        raise ValueError(f"{name} was given twice: by --guidance and by an option of its own")
    settings = {"method": "sag", **given, **options}
    method = settings.pop("method")
    known = _names(_methods()[method])
    for name in options:
        if name not in known:
            raise ValueError(_unknown(name, known, f"setting of {method}"))
    _methods()[method](**settings)
    return {**given, **options}


def check_methods(names: Sequence[str]) -> None:
    """Refuse unknown methods before they are imported.

    Args:
        names: Short names.

    Raises:
        ValueError: One is unknown, or given twice.
    """
    known = declared_settings()
    for number, name in enumerate(names):
        if name not in known:
            raise ValueError(f"methods={','.join(names)!r}: {_unknown(name, known, 'guidance')}")
        if name in names[:number]:
            raise ValueError(f"methods={','.join(names)!r}: {name} was given twice")


def declared_settings() -> dict[str, list[str]]:
    """Names of each method's settings, as the methods' source declares them."""
    return {name: _names(method) for name, method in _settings_of_methods().items()}


def _names(method: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(method)]


def _methods() -> Mapping[str, Callable[..., object]]:
    """Each method's settings by its short name, with methods of others that are imported."""
    imported = sys.modules.get("self_attention_guidance.guidance.base")
    return _settings_of_methods() if imported is None else imported.METHODS


@functools.cache
def _settings_of_methods() -> dict[str, type]:
    """Dataclasses with the fields and the checks of each method, by its short name.

    The methods themselves import torch, which takes seconds. Settings and their checks do not need
    it. So they are made from the methods' source, without what weakens networks.
    """
    folder = Path(__file__).parent.parent / "guidance"
    source = [
        statement
        for path in sorted(folder.glob("*.py"))
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
    ]
    known: dict[str, Any] = {"math": math, "__name__": __name__}
    for module in (typing, collections.abc, dataclasses, checks):
        known |= {name: value for name, value in vars(module).items() if name[0] != "_"}
    for statement in source:
        if isinstance(statement, ast.Assign | ast.FunctionDef):
            with suppress(NameError):  # it needs a heavy library, so no check needs it
                _run(statement, known)
    classes = {each.name: each for each in source if isinstance(each, ast.ClassDef)}
    return {
        ast.literal_eval(keyword.value): _settings(name, classes, known)
        for name, each in classes.items()
        for keyword in each.keywords
        if keyword.arg == "method"
    }


def _settings(name: str, classes: Mapping[str, ast.ClassDef], known: dict[str, Any]) -> Any:
    """A dataclass with the fields and the checks of a class and of its base classes."""
    if name not in known:
        own = classes[name]
        for base in own.bases:
            _settings(ast.unparse(base), classes, known)
        kept = copy.copy(own)
        kept.keywords, kept.body = [], [ast.Pass()]
        for each in own.body:
            is_check = isinstance(each, ast.FunctionDef) and each.name == "__post_init__"
            if is_check or isinstance(each, ast.AnnAssign):
                kept.body.append(each)
        _run(ast.fix_missing_locations(kept), known)
    return known[name]


def _run(statement: ast.stmt, known: dict[str, Any]) -> None:
    """Run a statement of this package; its name is added to those known."""
    module = ast.Module([statement], type_ignores=[])
    exec(compile(module, "guidance", "exec", dont_inherit=True), known)


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
    cls = _methods()[method]
    kinds = get_type_hints(cls)
    try:
        settings = {name: _value(name, value, kinds[name]) for name, value in named.items()}
        cls(**settings)
    except ValueError as error:
        raise ValueError(f"guidance={text!r}: {error}") from None
    return {"method": method, **settings}


def _parts(text: str) -> list[str]:
    """The guidances of a text; a plus sign without spaces may separate layers."""
    return text.split(_PLUS if ":" in text else "+")


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The method and the settings of a text, checked to be known."""
    method, colon, rest = text.partition(":")
    method = method.strip().lower()
    if method not in _methods():
        raise ValueError(f"guidance={text!r}: {_unknown(method, _methods(), 'guidance')}")
    known = _names(_methods()[method])
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"guidance={text!r}: {part!r} must be NAME=VALUE")
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
    hint = f"did you mean {near[0]}? There" if near else "there"
    return f"{name!r} is no {kind}; {hint} are {', '.join(names)}"
