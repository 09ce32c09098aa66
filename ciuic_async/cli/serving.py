"""A small HTTP server for strangers: bounded threads, bounded time, bounded requests, no exception that ends it."""

from __future__ import annotations

import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

from ciuic_async.cli.output import text
from ciuic_async.errors import CiuicError, UsageError
from ciuic_async.version import __version__

MAX_THREADS = 32
REQUEST_S = 20.0
"""From connecting to the last byte of the answer: whoever sends or takes a byte at a time is cut off."""
IDLE_S = 10.0
"""Without any byte."""
_POLL_S = 0.25
_PAUSE_S = 0.01
_DRAIN_S = 1.0
_DRAIN_BYTES = 1 << 20
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: what a handler's ``reply`` gives."""

    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """One request on one connection, which is closed after it. Subclasses answer in ``reply``."""

    protocol_version = "HTTP/1.1"
    server_version = f"ciuic-async/{__version__}"
    sys_version = ""
    timeout = IDLE_S
    methods: ClassVar[tuple[str, ...]] = ("GET", "HEAD")

    _unread_bytes = 0

    def reply(self) -> Reply:
        """Answer to ``self.command`` (one of ``methods``) and ``self.path``, the raw target."""
        return Reply(404, b"not found\n")

    def read_body(self, limit_bytes: int) -> bytes | Reply:
        """The request's body, or the answer that refuses it."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdigit()):
            return Reply(411, b"a Content-Length is needed\n")
        if len(length) > 12 or int(length) > limit_bytes:
            return Reply(413, f"at most {limit_bytes} bytes\n".encode())
        body = self.rfile.read(int(length))
        self._unread_bytes = 0
        return body if len(body) == int(length) else Reply(400, b"the request ended early\n")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        self._unread_bytes = int(length) if length.isascii() and length.isdigit() and len(length) < 12 else 0
        if self.command not in self.methods:
            answer = Reply(405, b"method not allowed\n", headers={"Allow": ", ".join(self.methods)})
        else:
            try:
                answer = self.reply()
            except CiuicError as error:
                print(f"error: {text(error)}", file=sys.stderr, flush=True)
                answer = Reply(500, b"internal error\n")  # what went wrong here is not the asker's business
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "X-Content-Type-Options": "nosniff",
            **answer.headers,
            "Connection": "close",
        }.items():
            if answer.status != 304 or not name.startswith("Content-"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and answer.status != 304:
            self.wfile.write(answer.body)
        if self._unread_bytes:
            self._drain()

    def _drain(self) -> None:
        """Take in what the asker still sends: closing on it would destroy the answer on its way."""
        self.wfile.flush()
        self.connection.settimeout(_DRAIN_S)
        with suppress(OSError):
            self.rfile.read(min(self._unread_bytes, _DRAIN_BYTES))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """One line a request on stderr; what the asker sent cannot move the cursor."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = text(f"{when} {self.client_address[0]} {self.requestline[:200]} {int(code)}")
        print(line, file=sys.stderr, flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Errors of the protocol are told by their status."""


class BoundedServer(HTTPServer):
    """Answers on at most ``MAX_THREADS`` threads; further askers get a 503. ``start`` and ``close`` end everything.

    Args:
        address: host and port; port 0 takes a free one.
        handler: answers one request; may use ``self.server``.

    Raises:
        UsageError: kind ``cannot_listen``.
    """

    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._slots = threading.BoundedSemaphore(MAX_THREADS)
        self._mutex = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # and when it must be done
        self._workers: set[threading.Thread] = set()
        self._ended = False
        self._accepting = threading.Thread(target=self._accept, name="ciuic-http", daemon=True)
        try:
            super().__init__(address, handler)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"{address[0]}:{address[1]}: cannot listen there: {error}; choose another port (0: any)",
                kind="cannot_listen",
            ) from error
        self._woken, self._wake = socket.socketpair()

    def server_bind(self) -> None:
        """As usual, but without asking the name service who we are."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where it is reached."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def start(self) -> None:
        """Answer from now on, on threads of its own."""
        self._accepting.start()

    def close(self) -> None:
        """Finish what is being answered, within ``REQUEST_S``; then nothing is left. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._wake.send(b"x")
        if self._accepting.is_alive():
            self._accepting.join()
        self.server_close()
        self._wake.close()
        self._woken.close()
        deadline_s = time.monotonic() + REQUEST_S
        with self._mutex:
            workers = list(self._workers)
        for worker in workers:
            while worker.is_alive():
                worker.join(_POLL_S)
                self._cut_off(late_s=max(0.0, time.monotonic() - deadline_s))

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._ended:
                ready = {key.fileobj for key, _ in selector.select(_POLL_S)}
                if self.socket in ready and not self._ended:
                    try:
                        self.process_request(*self.get_request())
                    except OSError:  # the asker left, or descriptors ran out: then it is ready at once again
                        time.sleep(_PAUSE_S)
                self._cut_off()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(0)
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        worker = threading.Thread(target=self._work, args=(request, client_address), name="ciuic-http", daemon=True)
        with self._mutex:
            self._open[request] = time.monotonic() + REQUEST_S
            self._workers.add(worker)
        try:
            worker.start()
        except RuntimeError:  # no thread left
            self._forget(request, worker)
            self.shutdown_request(request)

    def _work(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # the asker left, or was cut off
        except Exception as error:
            print(f"error: {type(error).__name__}: {text(error)}", file=sys.stderr, flush=True)
        finally:
            self._forget(request, threading.current_thread())
            self.shutdown_request(request)

    def _forget(self, request: socket.socket, worker: threading.Thread) -> None:
        with self._mutex:
            self._open.pop(request, None)
            self._workers.discard(worker)
        self._slots.release()

    def _cut_off(self, late_s: float = 0.0) -> None:
        now_s = time.monotonic()
        with self._mutex:
            for request, deadline_s in self._open.items():
                if now_s >= deadline_s or late_s > 0:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)


def parse_address(value: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[::1]:PORT`` or ``:PORT``.

    Raises:
        UsageError: it is none of them.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(f"{value!r}: expected HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def serve_until_told(server: BoundedServer) -> None:
    """Answer until SIGTERM or SIGINT, then finish what is under way. On the main thread."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        told.wait()
    finally:
        server.close()
        for number, handler in before.items():
            signal.signal(number, handler)
