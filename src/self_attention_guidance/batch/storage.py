"""A folder, here or in an object store, in which files appear whole or not at all."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

import fsspec.core
from filelock import FileLock, Timeout

from ..generate.files import whole_file

UNFINISHED = ".unfinished"
LOCK = ".lock"
# In an object store, a run shows that it is alive by writing its lock again.
_LOCK_SECONDS = 60.0


class Storage:
    """Files below a folder. It can be pickled, and used by many processes.

    Attributes:
        url: The folder, or its URL as fsspec knows it, for example "s3://bucket/folder".
    """

    def __init__(self, url: str) -> None:
        """Makes nothing yet.

        Args:
            url: The folder.

        Raises:
            ValueError: It is of no kind that fsspec knows.
        """
        self.url = url
        self._files, self._root = self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections do not go to another process; it makes its own."""
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether it is in the file system of this machine."""
        protocols: Any = self._files.protocol
        return "file" in ((protocols,) if isinstance(protocols, str) else protocols)

    def make(self) -> None:
        """Makes the folder if there is none.

        Raises:
            ValueError: It cannot be made, or is a file.
        """
        try:
            if self.is_local:
                os.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={self.url!r} cannot be made: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; one of that name is replaced.

        Args:
            name: Of the file, with "/" between folders.
            content: All of it.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        with self.writing(name) as file:
            file.write(content)

    @contextmanager
    def writing(self, name: str) -> Generator[IO[bytes]]:
        """A file to write piece by piece; it appears under its name when the block ends well.

        Args:
            name: Of the file, with "/" between folders.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        if self.is_local:  # fsspec's own transactions go by way of another file system
            with whole_file(self._path(name), folder=self._path(UNFINISHED)) as file:
                yield file
            return
        # A connection of its own: the lock is written meanwhile, and is no part of it.
        files, _ = self._open(skip_instance_cache=True)
        with files.transaction, files.open(self._path(name), "wb") as file:
            yield file

    def read(self, name: str) -> bytes | None:
        """A file's content; `None` if there is none.

        Args:
            name: Of the file.
        """
        try:
            return cast("bytes", self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        Args:
            name: Of the file.
        """
        return bool(self._files.isfile(self._path(name)))

    def open(self, name: str) -> Any:
        """A file to read.

        Args:
            name: Of the file.
        """
        return self._files.open(self._path(name), "rb")

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted, with the folder before them.

        Args:
            folder: Its name; it need not exist.
        """
        try:
            found = cast("list[str]", self._files.ls(self._path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rsplit('/', 1)[-1]}" for path in found)

    def remove(self, *names: str) -> None:
        """Deletes files, or folders with all that is in them; they need not exist.

        Args:
            names: Of the files or folders.
        """
        for name in names:
            with suppress(FileNotFoundError):
                self._files.rm(self._path(name), recursive=True)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keeps other runs out of the folder for the length of the block.

        Raises:
            ValueError: Another run is in it.
        """
        self.make()
        with self._local_lock() if self.is_local else self._lease():
            self.remove(UNFINISHED)  # what a run that was killed left
            try:
                yield
            finally:
                self.remove(UNFINISHED)

    def _open(self, **options: bool) -> tuple[Any, str]:
        try:
            return cast("tuple[Any, str]", fsspec.core.url_to_fs(self.url, **options))
        except (ValueError, ImportError) as error:
            raise ValueError(f"out={self.url!r} cannot be used: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _local_lock(self) -> Any:
        """Ends with the process, however that ends."""
        try:
            return FileLock(self._path(LOCK)).acquire(timeout=0)
        except Timeout:
            raise self._in_use() from None

    @contextmanager
    def _lease(self) -> Generator[None]:
        there = self.read(LOCK)
        age = time.time() - json.loads(there)["time"] if there else _LOCK_SECONDS
        if age < _LOCK_SECONDS:
            raise self._in_use()
        ended = threading.Event()

        def keep() -> None:
            # From a thread: a single picture may take longer than a lock lasts.
            while not ended.wait(_LOCK_SECONDS / 4):
                self._write_lock()

        self._write_lock()
        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            self.remove(LOCK)

    def _write_lock(self) -> None:
        self.write(LOCK, json.dumps({"time": time.time()}).encode())

    def _in_use(self) -> ValueError:
        return ValueError(f"out={self.url!r} is in use by another run: wait for it, or end it")
