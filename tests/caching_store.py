"""An object store in memory that keeps listings of its folders, as those on the network do."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CachingStore(MemoryFileSystem):
    """What one connection listed does not change when another connection writes."""

    protocol = "caching"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.listings: dict[str, list[dict[str, Any]]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("caching://", "memory://"))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True)
        found = self.listings[path]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        known = self.listings.get(self._parent(path))
        for each in known or ():
            if each["name"] == path:
                return each
        if known is not None:
            raise FileNotFoundError(path)
        return super().info(path, **options)

    def invalidate_cache(self, path: str | None = None) -> None:
        super().invalidate_cache(path)
        self.listings.clear()


def register_caching_store() -> None:
    """Make it known as `caching://`."""
    fsspec.register_implementation("caching", CachingStore, clobber=True)
