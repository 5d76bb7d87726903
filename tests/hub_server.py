"""A small hub of models on this machine, for what a real one answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves folders as public models.

    Attributes:
        requests: The paths that were asked for.
        failure: A status that is the answer to everything; `None` answers as a hub does.
    """

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.models, self.gated = models, gated
        self.requests: list[str] = []
        self.failure: int | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.models.get(name)
        if self.server.failure is not None:
            self._send(self.server.failure, b"<html>busy</html>")
        elif folder is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated and "resolve" in rest:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif rest[:1] == ["resolve"]:
            self._send_file(folder.joinpath(*rest[2:]))
        elif rest[:1] == ["tree"]:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            listed = [
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": _digest(file),
                }
                for file in files
            ]
            self._send(200, json.dumps(listed).encode())
        else:
            files = [each.relative_to(folder).as_posix() for each in folder.rglob("*.*")]
            siblings = [{"rfilename": file} for file in sorted(files)]
            info = {"id": name, "sha": REVISION, "siblings": siblings, "tags": [], "private": False}
            self._send(200, json.dumps(info).encode())

    def _send_file(self, file: Path) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": REVISION}
        self._send(200, file.read_bytes(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
