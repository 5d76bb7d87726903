"""Public names of packages that are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exported(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package whose names live in modules that take seconds to import.

    Args:
        package: Its `__name__`.
        homes: The modules by the names that they hold, relative to the package (".job").

    Returns:
        The function. It raises `AttributeError` for names that have no home.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return get
