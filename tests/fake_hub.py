"""A hub on the loopback: the requests that huggingface_hub makes, with faults on demand.

It answers the repository listing (``/api/models/...``, ``/api/datasets/...``), and HEAD and GET of
``/<repo>/resolve/<revision>/<file>``. As on the real hub, large files are redirected to another
host (here ``localhost`` instead of ``127.0.0.1``), which serves byte ranges. The files of the
repository ``web`` are plain files at ``/web/``, as a release page has them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

STALL_SECONDS = 3.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens to the next ``times`` requests of ``method`` whose path contains ``match``."""

    match: str
    method: str = "GET"
    status: int = 0  # answer with this status,
    headers: dict[str, str] = field(default_factory=dict)  # and these headers
    cut_after: int | None = None  # or send this many bytes, then drop the connection
    stall_after: int | None = None  # or send this many bytes, then nothing for STALL_SECONDS
    wrong_bytes: bool = False  # or flip every bit of the content
    times: int = 1


@dataclass
class FakeHub:
    """A running hub: its repositories, the faults to come and the requests so far."""

    endpoint: str
    files: dict[str, dict[str, bytes]]  # repository ("datasets/x/y" for data sets) -> its files
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    tokens: list[tuple[str, str | None]] = field(default_factory=list)  # path, authorization
    commit: str = COMMIT
    seconds: float = 0.0  # that a body takes
    begun: list[tuple[float, str]] = field(default_factory=list)  # bodies: when (time.time), path
    ended: list[tuple[float, str]] = field(default_factory=list)

    def bodies(self, name: str) -> int:
        """How often the content of a weights file was sent, in whole or in part."""
        digests = {hashlib.sha256(files[name]).hexdigest() for files in self.files.values()
                   if name in files}  # fmt: skip
        return sum(path.rpartition("/")[2] in digests for _, path in self.begun)

    def most_at_once(self) -> int:
        """How many bodies were under way at one moment, at most."""
        changes = [(t, 1) for t, _ in self.begun] + [(t, -1) for t, _ in self.ended]
        now = most = 0
        for _, change in sorted(changes):
            now += change
            most = max(most, now)
        return most


@contextmanager
def fake_hub(files: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """Serve these repositories until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}", files)
    server.hub = hub  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_pause = time.sleep  # tests replace time.sleep


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub: FakeHub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue]
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # the client's own business
            return self._send(200, b'{"standardEnvVars": [], "harnesses": {}}', {}, body)
        hub.requests.append((self.command, path))
        hub.tokens.append((path, self.headers.get("authorization")))
        fault = self._fault(hub, path)
        if fault is not None and fault.status:
            return self._send(fault.status, b"", fault.headers, body)
        if path.startswith("/api/"):
            return self._listing(hub, path, body)
        if path.startswith("/cdn/"):
            content = next(
                content
                for repository in hub.files.values()
                for content in repository.values()
                if hashlib.sha256(content).hexdigest() == path.removeprefix("/cdn/")
            )
            return self._timed(path, content, fault, body)
        if path.startswith("/web/"):
            content = hub.files.get("web", {}).get(path.removeprefix("/web/"))
            if content is None:
                return self._send(404, b"", {}, body)
            return self._timed(path, content, fault, body)
        return self._resolve(hub, path, body)

    def _fault(self, hub: FakeHub, path: str) -> Fault | None:
        for fault in hub.faults:
            if fault.times and fault.match in path and fault.method == self.command:
                fault.times -= 1
                return fault
        return None

    def _listing(self, hub: FakeHub, path: str, body: bool) -> None:
        repo, _, revision = path.removeprefix("/api/").partition("/revision/")
        repo = repo.removeprefix("models/")
        if repo not in hub.files:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in ("", "main", hub.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
                "lfs": {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 134,
                },
            }
            for name, content in hub.files[repo].items()
        ]
        answer = {"id": repo, "modelId": repo, "sha": hub.commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _resolve(self, hub: FakeHub, path: str, body: bool) -> None:
        repo, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo not in hub.files:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in ("main", hub.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        headers = {"X-Repo-Commit": hub.commit}
        if name not in hub.files[repo]:
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, body)
        content = hub.files[repo][name]
        digest = hashlib.sha256(content).hexdigest()
        port = urlsplit(hub.endpoint).port
        headers |= {
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{digest}"',
            "Location": f"http://localhost:{port}/cdn/{digest}",
        }
        self._send(302, b"", headers, body)

    def _timed(self, path: str, content: bytes, fault: Fault | None, body: bool) -> None:
        hub: FakeHub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue]
        hub.begun.append((time.time(), path))
        _pause(hub.seconds)
        try:
            self._content(content, fault, body)
        except OSError:  # the client has left
            self.close_connection = True
        hub.ended.append((time.time(), path))

    def _content(self, content: bytes, fault: Fault | None, body: bool) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if fault is not None and fault.wrong_bytes:
            content = bytes(255 - value for value in content)
        part = content[start:]
        headers = {"Accept-Ranges": "bytes", "ETag": '"cdn"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault is not None and fault.cut_after is not None:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: fault.cut_after])
            self.close_connection = True
            return
        if fault is not None and fault.stall_after is not None:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: fault.stall_after])
            self.wfile.flush()
            _pause(STALL_SECONDS)
            self.close_connection = True
            return
        if start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"}, body)
        self._send(206 if start else 200, part, headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
