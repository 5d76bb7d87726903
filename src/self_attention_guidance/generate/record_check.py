"""Check of a picture's record, which anyone may have written. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks import check_count, check_finite, check_seed, check_text
from .devices import check_dtype_name
from .settings import GenerationSettings

_TEXTS = ("prompt", "model", "dtype", "scheduler")
_OBJECTS = ("settings", "guidance", "scheduler_config")


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record with which no picture of a prompt can be drawn again.

    The guidance and the scheduler are not checked, as `restore` makes them.

    Args:
        record: As `read_record` returned it.

    Raises:
        ValueError: An entry is missing, or of another kind.
    """
    for name in (*_TEXTS, *_OBJECTS, "seed"):
        if name not in record:
            raise ValueError(f"{name} is missing")
    for name in _TEXTS:
        if name != "model" or record[name] is not None:  # no name was given in Python
            check_text(name, record[name])
    check_seed(record["seed"])
    check_dtype_name(record["dtype"])
    for name in (*_OBJECTS, "start"):
        if not isinstance(record.get(name, {}), dict):
            raise ValueError(f"{name}={record[name]!r:.60} must be an object")
    given = {name: value for name, value in record["settings"].items() if value is not None}
    unknown = given.keys() - GenerationSettings.__dataclass_fields__
    if unknown:
        raise ValueError(f"settings: {min(unknown)!r} is unknown")
    for name in ("image", "mask"):
        check_text(name, given.get(name, ""))
    GenerationSettings(**given)
    pairs = {"size": [record.get("size", (1, 1))], "loras": record.get("loras", [])}
    for name, found in pairs.items():
        if not isinstance(found, list) or not all(
            isinstance(each, list | tuple) and len(each) == 2 for each in found
        ):
            raise ValueError(f"{name}={record[name]!r:.60} must hold pairs")
    for side in pairs["size"][0]:
        check_count("size", side)
    for path, scale in pairs["loras"]:
        check_text("loras", path)
        check_finite("loras", scale)
