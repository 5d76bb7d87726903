"""A folder, local or in an object store, in which files appear complete or not at all."""

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
# In an object store, a run shows that it is alive by rewriting its lock.
_LOCK_SECONDS = 60.0


class Storage:
    """The files in a folder. It can be pickled and used by many processes.

    Attributes:
        url: The folder, or its URL as fsspec knows it, for example "s3://bucket/folder".
    """

    def __init__(self, url: str) -> None:
        """Open the file system; create nothing yet.

        Args:
            url: The folder.

        Raises:
            ValueError: fsspec does not know this kind of URL.
        """
        self.url = url
        self._files, self._root = self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URL only: another process makes its own connection."""
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether it is in the file system of this machine."""
        protocols: Any = self._files.protocol
        return "file" in ((protocols,) if isinstance(protocols, str) else protocols)

    def make(self) -> None:
        """Create the folder if it does not exist.

        Raises:
            ValueError: It cannot be created, or is a file.
        """
        try:
            if self.is_local:
                os.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={self.url!r} cannot be made: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file, and replace one of that name.

        Args:
            name: Name of the file, with "/" between folders.
            content: Its whole content.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        with self.writing(name) as file:
            file.write(content)

    @contextmanager
    def writing(self, name: str) -> Generator[IO[bytes]]:
        """A file to write piece by piece; it appears under its name if the block raises nothing.

        Args:
            name: Name of the file, with "/" between folders.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        if self.is_local:  # fsspec's own transactions use another file system
            with whole_file(self._path(name), folder=self._path(UNFINISHED)) as file:
                yield file
            return
        # A separate connection: the lock, written meanwhile, must not be in the transaction.
        files, _ = self._open(skip_instance_cache=True)
        with files.transaction, files.open(self._path(name), "wb") as file:
            yield file

    def read(self, name: str) -> bytes | None:
        """A file's content; `None` if it does not exist.

        Args:
            name: Name of the file.
        """
        try:
            return cast("bytes", self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        Args:
            name: Name of the file.
        """
        return bool(self._files.isfile(self._path(name)))

    def open(self, name: str) -> Any:
        """A file to read.

        Args:
            name: Name of the file.
        """
        return self._files.open(self._path(name), "rb")

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; each begins with the folder's name.

        Args:
            folder: Its name; it need not exist.
        """
        try:
            found = cast("list[str]", self._files.ls(self._path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rsplit('/', 1)[-1]}" for path in found)

    def remove(self, *names: str) -> None:
        """Delete files, or folders with their contents; they need not exist.

        Args:
            names: Names of the files or folders.
        """
        for name in names:
            with suppress(FileNotFoundError):
                self._files.rm(self._path(name), recursive=True)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep other runs out of the folder while the block runs.

        Raises:
            ValueError: Another run uses it.
        """
        self.make()
        with self._local_lock() if self.is_local else self._lease():
            self.remove(UNFINISHED)  # what a killed run left
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
        """A lock that is released when the process ends, however that happens."""
        try:
            return FileLock(self._path(LOCK)).acquire(timeout=0)
        except Timeout:
            raise self._in_use() from None

    @contextmanager
    def _lease(self) -> Generator[None]:
        lock = self.read(LOCK)
        age = time.time() - json.loads(lock)["time"] if lock else _LOCK_SECONDS
        if age < _LOCK_SECONDS:
            raise self._in_use()
        ended = threading.Event()

        def keep() -> None:
            # In a thread, because a single picture may take longer than a lock lasts.
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
