"""A model hub on localhost that speaks as much of the hub's protocol as its client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeHub:
    """Repositories by name, each a folder on disk with one commit, and what was asked for."""

    url: str = ""
    repos: dict[str, Path] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    gated: set[str] = field(default_factory=set)
    # The commit that files come from, once it is no longer the one that was listed.
    moved_to: str = COMMIT
    # (method, repository, path) of files whose content or metadata was asked for
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    # Folders whose listing was asked for, in this order
    listed: list[str] = field(default_factory=list)

    @property
    def downloaded(self) -> set[str]:
        """Paths of the files whose content was sent."""
        return {path for method, _, path in self.requests if method == "GET"}


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub on a free port, until the end of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    # How soon it notices that it is to end.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := _API.fullmatch(path):
                self._api(*match.groups())
            elif match := _FILE.fullmatch(path):
                self._file(*match.groups())
            else:
                self._refuse(404, "EntryNotFound")

        def _api(self, repo: str, kind: str | None, revision: str | None, path: str | None) -> None:
            root = self._root(repo, revision or "main")
            if root is None:
                return
            if kind != "tree":
                files = sorted(p for p in root.rglob("*") if p.is_file())
                siblings = [{"rfilename": p.relative_to(root).as_posix()} for p in files]
                self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})
                return
            hub.listed.append(path or "")
            folder = root / (path or "")
            if not folder.is_dir():
                self._refuse(404, "EntryNotFound")
                return
            self._json([_entry(root, inside) for inside in sorted(folder.iterdir())])

        def _file(self, repo: str, revision: str, name: str) -> None:
            root = self._root(repo, revision)
            if root is None:
                return
            if not (root / name).is_file():
                self._refuse(404, "EntryNotFound")
                return
            hub.requests.append((self.command, repo, name))
            content = (root / name).read_bytes()
            self._send(
                200,
                content,
                {
                    "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                    "X-Repo-Commit": hub.moved_to,
                    "Content-Type": "application/octet-stream",
                },
            )

        def _root(self, repo: str, revision: str) -> Path | None:
            if repo in hub.gated:
                self._refuse(403, "GatedRepo")
            elif repo not in hub.repos:
                self._refuse(404, "RepoNotFound")
            elif revision not in hub.revisions:
                self._refuse(404, "RevisionNotFound")
            else:
                return hub.repos[repo]
            return None

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    oid = hashlib.sha1(name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "oid": oid, "size": 0, "path": name}
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}
