"""A folder, local or in an object store, in which files appear complete or not at all."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from types import UnionType
from typing import IO, Any, TypeVar, cast

import fsspec.core
from filelock import FileLock, Timeout

from ..generate.files import whole_file

UNFINISHED = ".unfinished"
LOCK = ".lock"
# In an object store, a run shows that it is alive by rewriting its lock.
_LOCK_SECONDS = 60.0
# What parsing a damaged file raises.
_DAMAGE = (
    *(ValueError, TypeError, LookupError, RecursionError, MemoryError, NotImplementedError),
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error),
)

Content = TypeVar("Content")


class Storage:
    """The files in a folder. It can be pickled and used by many processes.

    Attributes:
        url: The folder, or its URL as fsspec knows it, for example "s3://bucket/folder".
        argument: Name of the argument that gave it, for messages.
    """

    def __init__(self, url: str, argument: str = "out") -> None:
        """Open the file system; create nothing yet.

        Args:
            url: The folder.
            argument: Name of the argument that gave it, for messages.

        Raises:
            ValueError: fsspec does not know this kind of URL.
        """
        self.url, self.argument = url, argument
        self._is_taken = False  # whether another run has the lock that this one had
        self._files, self._root = self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URL only: another process makes its own connection."""
        return Storage, (self.url, self.argument)

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
            raise ValueError(
                f"{self.argument}={self.url!r} cannot be made: {error.strerror}"
            ) from error

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
            OSError: It cannot be written, for example because the disk is full, or another run
                holds the lock now.
        """
        if self.is_local:  # fsspec's own transactions use another file system
            with whole_file(self._path(name), folder=self._path(UNFINISHED)) as file:
                yield file
            return
        if self._is_taken:
            raise OSError("another run took the folder over, as this one could not renew its lock")
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
            return cast("bytes", self._fresh().cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def parsed(self, name: str, parse: Callable[[bytes], Content]) -> Content | None:
        """What a file says; `None` if it does not exist.

        Args:
            name: Name of the file.
            parse: Reads its content; may raise what the standard library raises for wrong data.

        Raises:
            ValueError: It is damaged.
        """
        content = self.read(name)
        try:
            return None if content is None else parse(content)
        except _DAMAGE as error:
            raise self.damaged(name, error) from error

    def damaged(self, name: str, error: BaseException | str, remedy: str = "") -> ValueError:
        """The error for a file that can't be used.

        Args:
            name: Name of the file.
            error: What is wrong with it.
            remedy: What to do; by default, what helps with every file.
        """
        reason = " ".join(str(error).split())[:200]
        remedy = remedy or "restore it, name another folder, or start again with overwrite=True"
        return ValueError(f"{self.argument}: '{self.url}/{name}' is damaged ({reason}): {remedy}")

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        Args:
            name: Name of the file.
        """
        return bool(self._fresh().isfile(self._path(name)))

    def open(self, name: str) -> Any:
        """A file to read.

        Args:
            name: Name of the file.
        """
        return self._fresh().open(self._path(name), "rb")

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; each begins with the folder's name.

        Args:
            folder: Its name; it need not exist.
        """
        return sorted(self._sizes(folder))

    def gone(self, names: Iterable[str]) -> set[str]:
        """Those files that do not exist, or are empty.

        Args:
            names: Names of files.
        """
        wanted = set(names)
        # Listing a folder is much cheaper than asking for each of its files.
        for folder in {name.rpartition("/")[0] for name in wanted}:
            wanted -= {name for name, size in self._sizes(folder).items() if size}
        return wanted

    def _sizes(self, folder: str) -> dict[str, int]:
        try:
            found = cast("list[dict[str, Any]]", self._fresh().ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {f"{folder}/{each['name'].rsplit('/', 1)[-1]}": each["size"] for each in found}

    def remove(self, *names: str) -> None:
        """Delete files, or folders with their contents; they need not exist.

        Args:
            names: Names of the files or folders.
        """
        for name in names:
            with suppress(FileNotFoundError):
                self._fresh().rm(self._path(name), recursive=True)

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
            raise ValueError(f"{self.argument}={self.url!r} cannot be used: {error}") from error

    def _fresh(self) -> Any:
        """The file system as it is now: other connections and other processes write to it."""
        self._files.invalidate_cache()
        return self._files

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
        owner = uuid.uuid4().hex
        self._take_lock(owner)
        ended = threading.Event()

        def keep() -> None:
            # In a thread, because a single picture may take longer than a lock lasts.
            while not ended.wait(_LOCK_SECONDS / 4):
                with suppress(Exception):  # the network may fail; a lock lasts for several tries
                    self._is_taken = _owner_of(self.read(LOCK)) != owner
                    if self._is_taken:
                        return
                    self.write(LOCK, _lock_of(owner))

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            with suppress(Exception):  # it ends by itself, too
                if _owner_of(self.read(LOCK)) == owner:
                    self.remove(LOCK)
            self._is_taken = False

    def _take_lock(self, owner: str) -> None:
        lock = self.read(LOCK)
        if abs(time.time() - _time_of(lock)) < _LOCK_SECONDS:
            raise self._in_use()
        if lock is None and self._create(LOCK, _lock_of(owner)):
            return
        if lock is not None:
            # Another machine's clock may be wrong. A lock that a run holds is renewed meanwhile.
            time.sleep(_LOCK_SECONDS / 3)
            if self.read(LOCK) != lock:
                raise self._in_use()
        self.write(LOCK, _lock_of(owner))
        time.sleep(_LOCK_SECONDS / 60)  # of several runs that write, the last one has the lock
        if _owner_of(self.read(LOCK)) != owner:
            raise self._in_use()

    def _create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; whether this store can do so in one step."""
        try:
            self._files.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            raise self._in_use() from None
        except Exception:  # each store has its own error for what it does not know
            return False
        return True

    def _in_use(self) -> ValueError:
        return ValueError(
            f"{self.argument}={self.url!r} is in use by another run: wait for it, or end it"
        )


def json_object(content: object, **kinds: type | UnionType) -> dict[str, Any]:
    """A JSON object, checked to have some members.

    Args:
        content: The text of a file, or a value of another object.
        kinds: Types of its members, by name.

    Raises:
        ValueError: It is something else.
    """
    found: Any = json.loads(content) if isinstance(content, bytes) else content
    if not isinstance(found, dict):
        raise ValueError("it must hold a JSON object")
    for name, kind in kinds.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{name} is missing, or of another type")
    return cast("dict[str, Any]", found)


def _lock_of(owner: str) -> bytes:
    return json.dumps({"time": time.time(), "owner": owner}).encode()


def _owner_of(lock: bytes | None) -> str | None:
    """The run that wrote a lock; `None` if it is damaged."""
    with suppress(ValueError):
        return str(json_object(lock or b"{}", owner=str)["owner"])
    return None


def _time_of(lock: bytes | None) -> float:
    """When a lock was written; 0 if it is damaged, since it must not keep all runs out."""
    with suppress(ValueError):
        return float(json_object(lock or b"{}", time=int | float)["time"])
    return 0.0
