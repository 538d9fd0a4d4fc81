"""A faulty network before a server that speaks S3 (or any HTTP): seeded faults, real sockets.

    with (
        s3_server("moto", folder) as address,
        faulty_s3(address, seed=1, rates={"500": 0.1, "lost": 0.05}) as proxy,
    ):
        use_s3(monkeypatch, proxy.address)
        ...
        proxy.counts        # Counter of the faults dealt
        proxy.rates = {}    # peace; rates may be changed at any time, also {"refuse": 1.0}: outage

Each request draws at most one fault from the seed and its number:

=============  ====================================================================================
``500 503``    the server's error, without the request having reached it
``slow_down``  503 SlowDown, likewise
``reset``      the connection is reset before the request is passed on
``lost``       the request is carried out, then the connection is reset: the reply is lost
``late_500``   the request is carried out, and the reply is 500 all the same
``conflict``   409 OperationAborted, for conditional writes only
``cut``        the reply's body ends in the middle: fewer bytes than announced
``upload_cut`` the upload ends in the middle: the server gets half of it, then a closed connection
``stall``      nothing for ``stall_seconds``, then a closed connection
``delay``      the reply comes ``delay_seconds`` late
``refuse``     the connection is closed at once
=============  ====================================================================================

With one client at a time the same seed deals the same faults to the same requests; with several,
their order decides. ``only`` narrows it to methods, such as ``("PUT",)``, and ``script`` deals the
given faults to the first requests before any drawing: ``script=["lost", "", "500"]``.

From a shell: ``python -m tests.faulty_s3 http://127.0.0.1:9000 --seed 1 lost=0.1 500=0.1`` prints
its address and runs until it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

FAULTS = (
    "500", "503", "slow_down", "reset", "lost", "late_500", "conflict", "cut", "upload_cut",
    "stall", "delay", "refuse",
)  # fmt: skip
_ERROR = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code} by the fault "
    "proxy</Message></Error>"
)
_ANSWERS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "late_500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Service Unavailable", "ServiceUnavailable"),
    "slow_down": ("503 Slow Down", "SlowDown"),
    "conflict": ("409 Conflict", "OperationAborted"),
}


@dataclass
class FaultyS3:
    """The proxy's settings, which may be changed while it runs, and what it did."""

    upstream: str
    seed: int
    rates: Mapping[str, float]
    script: list[str] = field(default_factory=list)
    only: Sequence[str] = ()
    stall_seconds: float = 60.0
    delay_seconds: float = 1.0
    address: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, method: str, is_conditional: bool, has_body: bool) -> str:
        """The next request's fault, "" for none."""
        with self._lock:
            number = self.num_requests
            self.num_requests += 1
            if self.only and method not in self.only:
                return ""
            fault = self.script.pop(0) if self.script else self._drawn(number)
            if (fault == "conflict" and not is_conditional) or (
                fault == "upload_cut" and not has_body
            ):
                return ""
            if fault:
                self.counts[fault] += 1
            return fault

    def _drawn(self, number: int) -> str:
        place = random.Random(f"{self.seed}/{number}").random()
        for fault, rate in self.rates.items():
            assert fault in FAULTS, fault
            if place < rate:
                return fault
            place -= rate
        return ""


@contextlib.contextmanager
def faulty_s3(
    upstream: str,
    *,
    seed: int = 0,
    rates: Mapping[str, float] | None = None,
    script: Sequence[str] = (),
    only: Sequence[str] = (),
    stall_seconds: float = 60.0,
    delay_seconds: float = 1.0,
    port: int = 0,
) -> Iterator[FaultyS3]:
    """Run the proxy on a loopback port before ``upstream``, such as http://127.0.0.1:9000."""
    proxy = FaultyS3(upstream, seed, rates or {}, list(script), only, stall_seconds, delay_seconds)
    server = _Server(("127.0.0.1", port), _Connection)
    server.proxy = proxy
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    proxy: FaultyS3

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are none of a test's business."""


@dataclass
class _Message:
    """One HTTP message: start line, headers as they came, body."""

    start: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return next((v for k, v in self.headers if k.lower() == name), None)

    def head(self) -> bytes:
        """Start line and headers, with the body's length and the connection to be closed."""
        kept = [
            (k, v)
            for k, v in self.headers
            if k.lower() not in (b"connection", b"transfer-encoding", b"content-length")
        ]
        # HEAD answers announce a length without having a body.
        length = self.header(b"content-length") or b"%d" % len(self.body)
        kept += [(b"content-length", length), (b"connection", b"close")]
        return self.start + b"\r\n" + b"".join(k + b": " + v + b"\r\n" for k, v in kept) + b"\r\n"


class _Connection(socketserver.StreamRequestHandler):
    """One request per connection."""

    server: _Server

    def handle(self) -> None:
        proxy = self.server.proxy
        request = _read(self.rfile)
        if request is None:
            return
        method = request.start.split(b" ")[0].decode()
        fault = proxy.draw(method, request.header(b"if-none-match") is not None, bool(request.body))
        if fault == "refuse":
            return
        if fault == "stall":
            time.sleep(proxy.stall_seconds)
            return
        if fault == "reset":
            return self._reset()
        if fault in _ANSWERS and fault != "late_500":
            return self._answer(fault)
        if fault == "upload_cut":
            _pass_on(proxy.upstream, request, cut=True)
            return self._reset()
        reply = _pass_on(proxy.upstream, request)
        if reply is None:
            return self._reset()
        if fault == "lost":
            return self._reset()
        if fault == "late_500":
            return self._answer(fault)
        if fault == "delay":
            time.sleep(proxy.delay_seconds)
        body = reply.body
        if fault == "cut":
            body = body[: len(body) // 2]
        self.wfile.write(reply.head() + body)

    def _answer(self, fault: str) -> None:
        status, code = _ANSWERS[fault]
        body = _ERROR.format(code=code).encode()
        start = f"HTTP/1.1 {status}".encode()
        headers = [(b"content-type", b"application/xml")]
        self.wfile.write(_Message(start, headers, body).head() + body)

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def _pass_on(upstream: str, request: _Message, *, cut: bool = False) -> _Message | None:
    """Carry out a request at the server. None if it does not answer, or got only half of it."""
    parts = urlsplit(upstream)
    assert parts.hostname is not None
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=120) as server:
            if cut:
                server.sendall(request.head() + request.body[: len(request.body) // 2])
                server.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    server.settimeout(5)
                    server.recv(1)
                return None
            server.sendall(request.head() + request.body)
            with server.makefile("rb") as file:
                no_body = request.start.startswith(b"HEAD ")
                return _read(file, no_body=no_body, is_reply=True)
    except OSError:
        return None


def _read(file, *, no_body: bool = False, is_reply: bool = False) -> _Message | None:
    """Read one message, whichever way its body's length is told. None at the end of the stream."""
    start = file.readline().strip()
    if not start:
        return None
    headers: list[tuple[bytes, bytes]] = []
    while line := file.readline().strip():
        name, _, value = line.partition(b":")
        headers.append((name.strip(), value.strip()))
    message = _Message(start, headers, b"")
    if no_body or (is_reply and start.split(b" ")[1] in (b"204", b"304")):
        return message
    length = message.header(b"content-length")
    if (message.header(b"transfer-encoding") or b"").lower() == b"chunked":
        message.body = b"".join(_chunks(file))
    elif length is not None:
        message.body = file.read(int(length))
        if len(message.body) < int(length):
            return None
    elif is_reply:
        message.body = file.read()
    return message


def _chunks(file) -> Iterator[bytes]:
    while size := int(file.readline().split(b";")[0], 16):
        yield file.read(size)
        file.readline()
    while file.readline().strip():
        pass


def main() -> None:
    """Run a proxy until killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("upstream")
    parser.add_argument("rates", nargs="*", help="fault=rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stall-seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    rates = {name: float(rate) for name, _, rate in (r.partition("=") for r in arguments.rates)}
    with faulty_s3(
        arguments.upstream, seed=arguments.seed, rates=rates, port=arguments.port,
        stall_seconds=arguments.stall_seconds,
    ) as proxy:  # fmt: skip
        print(proxy.address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
