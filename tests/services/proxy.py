"""A proxy on the loopback between an S3 client and its server, which fails as it is told to.

    with proxy(server.endpoint, ACCESS_KEY, SECRET_KEY) as between:
        rule = between.fail(lose_answer, "complete", times=1)
        ...                                  # the client talks to between.endpoint
        assert rule.hits == 1

A fault is a function that is handed one exchange and decides what becomes of it. Bodies pass in small pieces and are
never held, so that a proxy in the process of the client does not show in its memory. A server that is not there shows
as a connection that ends without an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, urlsplit

PIECE_BYTES = 1 << 16
TIMEOUT_S = 30.0
"""What the proxy waits for the server: longer than any test lets a server stand still on purpose."""

Headers = list[tuple[str, str]]


# --- one request ------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a server said; ``body`` comes in pieces and can be read once."""

    status: int
    headers: Headers
    body: Iterator[bytes]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def put_header(self, name: str, value: str) -> None:
        self.headers = [(key, text) for key, text in self.headers if key.lower() != name.lower()] + [(name, value)]

    @property
    def length_bytes(self) -> int:
        return int(self.header("content-length") or 0)


class Exchange:
    """A request of a client, and what becomes of it. Belongs to the thread of its connection."""

    def __init__(self, between: Proxy, handler: BaseHTTPRequestHandler) -> None:
        self._between = between
        self._handler = handler
        self.method = handler.command
        self.target = handler.path
        self.headers: Headers = list(handler.headers.items())
        self.left_bytes = int(handler.headers.get("Content-Length") or 0)
        self.kind = _kind(self.method, self.target, {key.lower() for key, _ in self.headers})

    # What a fault may do; it ends with exactly one of the next four.

    def pass_on(self) -> None:
        """As if there were no proxy."""
        self.answer(self.forward())

    def answer(self, answer: Answer) -> None:
        """Send it, in pieces."""
        self.drain()
        handler = self._handler
        handler.send_response_only(answer.status)
        for name, value in answer.headers:
            handler.send_header(name, value)
        handler.end_headers()
        for piece in answer.body:
            self._between.throttle.take(len(piece))
            handler.wfile.write(piece)
            self._between.count_bytes("down", len(piece))

    def refuse(self, status: int, code: str, headers: Headers | None = None) -> None:
        """An error as S3 words it; the server learns nothing of the request."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>so says the proxy</Message></Error>".encode()
        always = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self.answer(Answer(status, always + (headers or []), iter([] if self.method == "HEAD" else [body])))

    def cut(self, reset: bool = False) -> None:
        """End the connection, with a TCP reset if asked for."""
        self._handler.close_connection = True
        if reset:
            connection = self._handler.connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                socket.close(connection.detach())

    # Steps towards it.

    def forward(self, *, without: tuple[str, ...] = (), anew: bool = False) -> Answer:
        """Let the server act on the request; its answer. Where there is no server the connection is cut.

        Args:
            without: headers that the server does not see; the request is signed anew then.
            anew: sign it anew in any case.
        """
        headers = self.headers
        if anew or any(name.lower() in without for name, _ in headers):
            headers = [(name, value) for name, value in headers if name.lower() not in without]
            headers = self._between.sign(self.method, self.target, headers)
        server = http.client.HTTPConnection(self._between.server, timeout=TIMEOUT_S)
        server.putrequest(self.method, self.target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            if name.lower() not in ("connection", "expect"):
                server.putheader(name, value)
        try:
            server.endheaders()
            for piece in self.body():
                server.send(piece)
            response = server.getresponse()
        except (OSError, http.client.HTTPException) as error:
            server.close()
            raise ConnectionAbortedError(f"the server is not there: {error}") from error
        return self._answer_of(response, server)

    def _answer_of(self, response: http.client.HTTPResponse, server: http.client.HTTPConnection) -> Answer:
        headers = [(key, value) for key, value in response.getheaders() if key.lower() not in _HOP_BY_HOP]
        if response.getheader("Content-Length") is None:  # chunked: short lists and errors
            whole = response.read()
            server.close()
            return Answer(response.status, [*headers, ("Content-Length", str(len(whole)))], iter([whole]))

        def pieces() -> Iterator[bytes]:
            try:
                while piece := response.read(PIECE_BYTES):
                    yield piece
            finally:
                response.close()
                server.close()

        return Answer(response.status, headers, pieces())

    def body(self) -> Iterator[bytes]:
        """What is still unread of the request's body."""
        while self.left_bytes:
            piece = self._handler.rfile.read(min(PIECE_BYTES, self.left_bytes))
            if not piece:
                raise ConnectionAbortedError("the client went away")
            self.left_bytes -= len(piece)
            self._between.throttle.take(len(piece))
            self._between.count_bytes("up", len(piece))
            yield piece

    def drain(self, keep_bytes: int = 0) -> None:
        """Read the request's body to its end, or but for its last ``keep_bytes``, and forget it."""
        pieces = self.body()
        while self.left_bytes > keep_bytes:
            next(pieces)

    def wait(self, seconds: float | None) -> None:
        """Stand still, at most until the proxy is calmed or closed."""
        self._between.calmed.wait(seconds)


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


def _kind(method: str, target: str, headers: set[str]) -> str:
    """What S3 calls a request, in one word."""
    query = dict(parse_qsl(urlsplit(target).query, keep_blank_values=True))
    if method == "PUT":
        return "part" if "uploadId" in query else "create" if "if-none-match" in headers else "put"
    if method == "POST":
        return "begin" if "uploads" in query else "complete" if "uploadId" in query else "post"
    if method == "DELETE":
        return "abort" if "uploadId" in query else "delete"
    if method == "GET":
        return "list" if {"list-type", "uploads"} & query.keys() else "range" if "range" in headers else "get"
    return method.lower()


# --- faults -----------------------------------------------------------------------------------------------------------

Fault = Callable[[Exchange], None]


def lose_answer(exchange: Exchange) -> None:
    """The server has done it, and nobody says so."""
    for _ in exchange.forward().body:
        pass
    exchange.cut()


def refuse(status: int, code: str, retry_after_s: int | None = None) -> Fault:
    """``503 SlowDown``, ``500 InternalError``: the server has not done it."""
    headers = [] if retry_after_s is None else [("Retry-After", str(retry_after_s))]
    return lambda exchange: exchange.refuse(status, code, headers)


def delay(seconds: float) -> Fault:
    def act(exchange: Exchange) -> None:
        exchange.wait(seconds)
        exchange.pass_on()

    return act


def hang(exchange: Exchange) -> None:
    """Takes the request and never answers."""
    exchange.drain()
    exchange.wait(None)
    exchange.cut()


def cut_body(exchange: Exchange) -> None:
    """Content-Length says more than what comes: half of it, then the end."""
    answer = exchange.forward()
    answer.body = _first(answer.body, answer.length_bytes // 2)
    exchange.answer(answer)
    exchange.cut()


def understate_body(exchange: Exchange) -> None:
    """Content-Length says less than what there is: the client sees a short body that is complete by its own account."""
    answer = exchange.forward()
    answer.put_header("Content-Length", str(answer.length_bytes // 2))
    exchange.answer(answer)
    exchange.cut()


def wrong_etag(exchange: Exchange) -> None:
    answer = exchange.forward()
    if answer.header("etag") is not None:
        answer.put_header("ETag", '"00000000000000000000000000000000"')
    exchange.answer(answer)


def part_of_range(exchange: Exchange) -> None:
    """206 with fewer bytes than asked for, and it says so."""
    answer = exchange.forward()
    if answer.status == 206:
        half = answer.length_bytes // 2
        first, total = _content_range(answer)
        answer.put_header("Content-Length", str(half))
        answer.put_header("Content-Range", f"bytes {first}-{first + half - 1}/{total}")
        answer.body = _first(answer.body, half)
    exchange.answer(answer)


def whole_for_range(exchange: Exchange) -> None:
    """200 with everything, whatever range was asked for."""
    exchange.answer(exchange.forward(without=("range",)))


def flip_bit(exchange: Exchange) -> None:
    """One bit of the first byte of the body is wrong."""
    answer = exchange.forward()
    if answer.status in (200, 206) and (first := next(answer.body, b"")):
        answer.body = _then(bytes([first[0] ^ 1]) + first[1:], answer.body)
    exchange.answer(answer)


def reset_upload(exchange: Exchange) -> None:
    """A TCP reset when half of the request's body is here; the server never hears of it."""
    exchange.drain(keep_bytes=exchange.left_bytes // 2)
    exchange.cut(reset=True)


def ignore_conditions(exchange: Exchange) -> None:
    """A server that knows no conditional requests."""
    exchange.answer(exchange.forward(without=("if-none-match", "if-match")))


def sign_anew(exchange: Exchange) -> None:
    """A server that knows whatever keys the client has."""
    exchange.answer(exchange.forward(without=("x-amz-security-token",), anew=True))


def _first(body: Iterator[bytes], size_bytes: int) -> Iterator[bytes]:
    """The first bytes of it; all of it is read, so that its connection ends well."""
    for piece in body:
        yield piece[:size_bytes]
        size_bytes = max(0, size_bytes - len(piece))


def _then(first: bytes, body: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from body


def _content_range(answer: Answer) -> tuple[int, str]:
    """First byte, and the size as it stands there."""
    span, _, total = (answer.header("content-range") or "").removeprefix("bytes ").partition("/")
    return int(span.partition("-")[0]), total


# --- the proxy --------------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """A fault, and which requests it meets."""

    fault: Fault
    kinds: frozenset[str]
    """``Exchange.kind``; empty: all."""
    share: float
    left: int | None
    """How often yet; None: without an end."""
    within: str
    """What the target must contain."""
    chance: random.Random
    hits: int = 0
    hit: threading.Event = field(default_factory=threading.Event)
    """Set when it has met its first request, before the fault acts."""

    def takes(self, exchange: Exchange) -> bool:
        """Called by one thread at a time."""
        if (self.kinds and exchange.kind not in self.kinds) or self.within not in exchange.target or self.left == 0:
            return False
        if self.chance.random() >= self.share:
            return False
        self.left = None if self.left is None else self.left - 1
        self.hits += 1
        self.hit.set()
        return True


class Throttle:
    """A limit for bytes in a second, of all connections together. Any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._free_s = 0.0
        self.ended = threading.Event()
        """Nobody waits any more."""
        self.bytes_per_s: float | None = None

    def take(self, size_bytes: int) -> None:
        """Wait until these bytes may pass."""
        if self.bytes_per_s is None:
            return
        with self._mutex:
            now_s = time.monotonic()
            wait_s = max(0.0, self._free_s - now_s)
            self._free_s = max(now_s, self._free_s) + size_bytes / self.bytes_per_s
        self.ended.wait(wait_s)


class Proxy:
    """Passes requests on to a server, but for those that a rule takes.

    Attributes:
        requests: how many there were, by method and by ``Exchange.kind``.
        transferred_bytes: bytes of bodies, ``"up"`` and ``"down"``.
        calmed: set while no fault may stand still.
    """

    def __init__(self, endpoint: str, access_key: str = "", secret_key: str = "") -> None:
        self.server = urlsplit(endpoint).netloc
        self._keys = access_key, secret_key
        self._mutex = threading.Lock()
        self._rules: list[Rule] = []
        self._connections: set[socket.socket] = set()
        self.requests: Counter[str] = Counter()
        self.transferred_bytes: Counter[str] = Counter()
        self.throttle = Throttle()
        self.calmed = threading.Event()
        self._server = _server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(
        self,
        fault: Fault,
        *kinds: str,
        share: float = 1.0,
        times: int | None = None,
        within: str = "",
        seed: int = 0,
    ) -> Rule:
        """From now on this fault meets requests of these kinds; of several rules the one that came first counts.

        Args:
            share: which part of them, drawn from ``seed``.
            times: how many of them at most.
            within: only requests whose path and query contain this.
        """
        rule = Rule(fault, frozenset(kinds), share, times, within, random.Random(seed))
        with self._mutex:
            self.calmed = threading.Event()
            self._rules.append(rule)
        return rule

    def calm(self) -> None:
        """No faults from now on; requests that hang are cut, and there is no limit to the bandwidth."""
        with self._mutex:
            self._rules.clear()
            self.calmed.set()
        self.throttle.bytes_per_s = None

    def close(self) -> None:
        """Cuts what is still connected. Idempotent."""
        self.calm()
        self.throttle.ended.set()
        self._server.shutdown()
        self._thread.join()
        with self._mutex:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    # For exchanges.

    def count_bytes(self, direction: str, size_bytes: int) -> None:
        with self._mutex:
            self.transferred_bytes[direction] += size_bytes

    def sign(self, method: str, target: str, headers: Headers) -> Headers:
        """The request's headers with a signature that fits them."""
        return sign(method, target, headers, *self._keys)

    def meet(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, in its connection's thread."""
        exchange = Exchange(self, handler)
        with self._mutex:
            self.requests.update((exchange.method, exchange.kind))
            rule = next((rule for rule in self._rules if rule.takes(exchange)), None)
        try:
            exchange.pass_on() if rule is None else rule.fault(exchange)
        except (OSError, http.client.HTTPException):  # client or server went away: neither is told more than that
            exchange.cut()

    def connected(self, connection: socket.socket) -> None:
        with self._mutex:
            self._connections.add(connection)

    def disconnected(self, connection: socket.socket) -> None:
        with self._mutex:
            self._connections.discard(connection)


def _server(between: Proxy) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def setup(self) -> None:
            super().setup()
            between.connected(self.connection)

        def finish(self) -> None:
            between.disconnected(self.connection)
            with suppress(OSError):
                super().finish()

        def handle(self) -> None:
            with suppress(OSError):  # a client that goes away between two requests
                super().handle()

        def _meet(self) -> None:
            between.meet(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _meet  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False
        request_queue_size = 128

    return Server(("127.0.0.1", 0), Handler)


@contextmanager
def proxy(endpoint: str, access_key: str = "", secret_key: str = "") -> Iterator[Proxy]:
    """A proxy for a ``with`` block; the keys are for faults that change what was signed."""
    running = Proxy(endpoint, access_key, secret_key)
    try:
        yield running
    finally:
        running.close()


# --- AWS Signature 4 --------------------------------------------------------------------------------------------------

REGION = "us-east-1"


def sign(method: str, target: str, headers: Headers, access_key: str, secret_key: str) -> Headers:
    """``headers``, ``Host`` among them, with an ``Authorization`` that fits. ``target`` is quoted already."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = [(key, value) for key, value in headers if key.lower() not in ("authorization", "x-amz-date")]
    content = next((value for key, value in kept if key.lower() == "x-amz-content-sha256"), "UNSIGNED-PAYLOAD")
    kept = [(key, value) for key, value in kept if key.lower() != "x-amz-content-sha256"]
    kept += [("x-amz-content-sha256", content), ("x-amz-date", now)]
    signed = {key.lower(): value for key, value in kept if key.lower() == "host" or key.lower().startswith("x-amz-")}
    path, _, query = target.partition("?")
    pairs = sorted((quote(k, "-_.~"), quote(v, "-_.~")) for k, v in parse_qsl(query, keep_blank_values=True))
    names = sorted(signed)
    lines = [
        method,
        path,
        "&".join(f"{k}={v}" for k, v in pairs),
        *(f"{name}:{signed[name].strip()}" for name in names),
    ]
    canonical = hashlib.sha256("\n".join([*lines, "", ";".join(names), content]).encode()).hexdigest()
    scope = f"{now[:8]}/{REGION}/s3/aws4_request"
    key = ("AWS4" + secret_key).encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{canonical}"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    who = f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}"
    return [*kept, ("Authorization", f"{who}, SignedHeaders={';'.join(names)}, Signature={key.hex()}")]
