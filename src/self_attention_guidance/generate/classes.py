"""Names of the classes of pixel-space models. No heavy import."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ..checks import parse_number

CLASSES_FILE = "classes.json"


def class_names(folder: str | Path) -> dict[str, int]:
    """The numbers of a model's classes by lower-case name; empty if they have no names.

    Args:
        folder: Folder of the model. The names are in its `classes.json`, a list or an object of
            names by numbers, or under "id2label" in its `model_index.json`, as diffusers'
            `DiTPipeline` has them. Commas separate several names of one class. A name of several
            classes is followed by the number: "crane (134)".

    Raises:
        ValueError: They have another format.
    """
    path = Path(folder)
    listed: object = _read(path / CLASSES_FILE)
    if listed is None:
        index = _read(path / "model_index.json")
        listed = cast("dict[str, Any]", index).get("id2label") if isinstance(index, dict) else None
    if isinstance(listed, list):
        listed = dict(enumerate(cast("list[object]", listed)))
    try:
        pairs = cast("Mapping[object, Any]", listed or {}).items()
        named = [
            (each.strip().lower(), int(cast("Any", number)))
            for number, names in pairs
            for each in names.split(",")
        ]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: the classes must be names, by numbers") from None
    # ImageNet has two classes of the name "crane".
    count = Counter(name for name, _ in set(named))
    return {f"{name} ({n})" if count[name] > 1 else name: n for name, n in named}


def refuse_empty_names(text: str) -> None:
    """Refuse a list of classes with nothing between two commas, or at an end.

    Args:
        text: As in `parse_classes`.

    Raises:
        ValueError: It is such a list.
    """
    if not all(part.strip() for part in text.split(",")):
        raise ValueError(
            f"classes={text!r} must be numbers or names between single commas, such as 207,360"
        )


def parse_classes(text: str, names: Mapping[str, int]) -> tuple[int, ...]:
    """Read classes like "207,360" or "heart,food-fruit".

    Args:
        text: Numbers or names, separated by commas.
        names: What `class_names` returned.

    Raises:
        ValueError: A name is empty or unknown; the message lists the nearest ones.
    """
    refuse_empty_names(text)
    return tuple(_number(part.strip(), names) for part in text.split(","))


def _number(part: str, names: Mapping[str, int]) -> int:
    try:
        return parse_number(part, int) if part.lower() not in names else names[part.lower()]
    except ValueError:
        raise ValueError(f"classes={part!r} {_rule(part.lower(), names)}") from None


def _rule(name: str, names: Iterable[str]) -> str:
    known = list(names)
    if not known:
        rule = "must be whole numbers separated by commas, for example 207,360"
        return f"{rule}: this model has no names for its classes"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [each for each in known if name and name in each and each not in near][:3]
    if near:
        return f"is no class of this model: the nearest are {', '.join(near)}"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"is no class of this model, which has {', '.join(known[:12])}{more}"


def _read(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
