"""A folder, here or in an object store, in which files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

import fsspec.core

_UNFINISHED = ".unfinished"
_LOCK = ".lock"
# Where the system locks no files, a run shows that it is alive by writing its lock again.
_LOCK_SECONDS = 60.0


class Storage:
    """Files below a folder. It can be pickled, and used by many processes.

    Attributes:
        url: The folder, or its URL as fsspec knows it, for example "s3://bucket/folder".
    """

    def __init__(self, url: str) -> None:
        """Makes the folder.

        Args:
            url: The folder.

        Raises:
            ValueError: It cannot be made, or is a file.
        """
        self.url = url
        self._files, self._root = self._open()
        try:
            if self.is_local:
                os.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={url!r} cannot be made: {error.strerror}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections do not go to another process; it makes its own."""
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether it is in the file system of this machine."""
        protocols: Any = self._files.protocol
        return "file" in ((protocols,) if isinstance(protocols, str) else protocols)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; one of that name is replaced.

        Args:
            name: Of the file, with "/" between folders.
            content: All of it.

        Raises:
            OSError: It cannot be written, for example because the disk is full.
        """
        if not self.is_local:  # object stores take a file as a whole
            self._files.pipe_file(self._path(name), content)
            return
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
        folder = self._path(_UNFINISHED) if self.is_local else tempfile.mkdtemp()
        temporary = os.path.join(folder, uuid.uuid4().hex)
        try:
            with _opened(temporary) as file:
                yield file
                file.flush()
                # Else a file could have its name and no content after a power failure.
                os.fsync(file.fileno())
            self._publish(temporary, name)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if not self.is_local:
                shutil.rmtree(folder)

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
        can_lock = self.is_local and os.name != "nt"
        with self._local_lock() if can_lock else self._lease():
            self.remove(_UNFINISHED)  # what a run that was killed left
            try:
                yield
            finally:
                self.remove(_UNFINISHED)

    def _open(self) -> tuple[Any, str]:
        try:
            return cast("tuple[Any, str]", fsspec.core.url_to_fs(self.url))
        except (ValueError, ImportError) as error:
            raise ValueError(f"out={self.url!r} cannot be used: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _publish(self, temporary: str, name: str) -> None:
        path = self._path(name)
        if not self.is_local:
            self._files.put_file(temporary, path)
            return
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(temporary, path)

    @contextmanager
    def _local_lock(self) -> Generator[None]:
        import fcntl

        with open(self._path(_LOCK), "w", encoding="utf-8") as file:
            try:
                # Ends with the process, however that ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise self._in_use() from None
            yield

    @contextmanager
    def _lease(self) -> Generator[None]:
        there = self.read(_LOCK)
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
            self.remove(_LOCK)

    def _write_lock(self) -> None:
        self.write(_LOCK, json.dumps({"time": time.time()}).encode())

    def _in_use(self) -> ValueError:
        return ValueError(f"out={self.url!r} is in use by another run: wait for it, or end it")


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "wb")
