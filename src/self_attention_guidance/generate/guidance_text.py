"""Reading the settings of a guidance from text like "sag:scale=0.5,blur_sigma=2"."""

from __future__ import annotations

import ast
import difflib
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

_NUMBERS = {float: "a number", int: "a whole number"}
_PLUS = " + "
_TRUTH = {"true": True, "false": False}


def guidance_of(
    texts: Sequence[str], options: dict[str, Any], has_scale: bool = False
) -> dict[str, Any]:
    """The settings of guidance that a command line gives.

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
    check_guidance(texts, options, has_scale)
    given = {**(parse_guidance(_PLUS.join(texts)) if texts else {}), **options}

    from .. import guidance

    guidance.guidance_of({"method": "sag", **given})
    return given


def check_guidance(
    texts: Sequence[str], options: Mapping[str, Any], has_scale: bool = False
) -> None:
    """Refuse wrong settings before the methods are imported, which takes seconds.

    Args:
        texts: As in `guidance_of`.
        options: As in `guidance_of`.
        has_scale: As in `guidance_of`.

    Raises:
        ValueError: A guidance is unknown, or a setting is unknown or given twice.
    """
    declared = _known_settings()
    parts = [_split(part, declared) for text in texts for part in _parts(text)]
    if len(parts) > 1:
        for name in options:
            raise ValueError(f"{name} of which guidance? Give it inside --guidance")
        return
    method, named = parts[0] if parts else ("sag", {})
    for name in named.keys() & {*options, *(["scale"] if has_scale else [])}:
        raise ValueError(f"{name} was given twice: by --guidance and by an option of its own")
    for name in options:
        if name not in declared[method]:
            raise ValueError(f"{_unknown(name, declared[method], f'setting of {method}')}")


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


def _known_settings() -> Mapping[str, Sequence[str]]:
    """Names of each method's settings, including methods of others that are imported."""
    imported = sys.modules.get("self_attention_guidance.guidance.base")
    if imported is None:
        return declared_settings()
    return {name: [each.name for each in fields(cls)] for name, cls in imported.METHODS.items()}


@functools.cache
def declared_settings() -> dict[str, list[str]]:
    """Names of each method's settings, as the methods' source declares them."""
    folder = Path(__file__).parent.parent / "guidance"
    statements = [
        statement
        for path in sorted(folder.glob("*.py"))
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
    ]
    classes = {each.name: each for each in statements if isinstance(each, ast.ClassDef)}
    return {
        ast.literal_eval(keyword.value): _declared(name, classes)
        for name, each in classes.items()
        for keyword in each.keywords
        if keyword.arg == "method"
    }


def _declared(name: str, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    """Fields of a dataclass and of its base classes."""
    if name not in classes:
        return []
    bases = [_declared(ast.unparse(base), classes) for base in classes[name].bases]
    own = [
        ast.unparse(each.target)
        for each in classes[name].body
        if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)
    ]
    return list(dict.fromkeys(n for names in (*bases, own) for n in names if n != "_"))


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
        ValueError: A name is unknown, or a value is not of its type.
    """
    from ..guidance import METHODS

    parts = _parts(text)
    if len(parts) > 1:
        several = [parse_guidance(part) for part in parts]
        return {"method": "+".join(each["method"] for each in several), "guidances": several}
    method, named = _split(text, _known_settings())
    kinds = get_type_hints(METHODS[method])
    return {"method": method, **{n: _value(n, value, kinds[n]) for n, value in named.items()}}


def _parts(text: str) -> list[str]:
    """The guidances of a text; a plus sign without spaces may separate layers."""
    return text.split(_PLUS if ":" in text else "+")


def _split(text: str, known: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, str]]:
    """The method and the settings of a text, checked to be known."""
    method, colon, rest = text.partition(":")
    method = method.strip().lower()
    if method not in known:
        raise ValueError(f"guidance={text!r}: {_unknown(method, known, 'guidance')}")
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"guidance={text!r}: {part!r} must be NAME=VALUE")
        if name not in known[method]:
            reason = _unknown(name, known[method], f"setting of {method}")
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
