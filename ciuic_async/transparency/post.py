"""One HTTP request with a bounded answer: for etcd, for timestamp authorities and for witnesses.

Whoever answers may be slow, lie or talk without end: the time is bounded as a whole and not for each read, what is read
has a limit, redirects are answers like others. Standard library only; each call has a connection of its own, so any
thread may call, and so may a child after a fork.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from ciuic_async.errors import StoreError, UsageError

AROUND_BYTES = 1 << 20
"""What may come around a body: status, headers, lengths of chunks. Who sends more has no end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Nothing in it is checked."""

    status: int
    content_type: str
    body: bytes


def check_url(url: str) -> SplitResult:
    """The parts of an ``http`` or ``https`` URL without a user.

    Raises:
        UsageError: kind ``bad_url``.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc or any(char <= " " or char > "~" for char in url):
        # A URL with a user may hold a password: it is not repeated.
        shown = "a URL with a user or password" if "@" in url else repr(url[:200])
        raise UsageError(f"{shown}: expected http://HOST[:PORT]/... or https://...", kind="bad_url")
    return parts


def post(
    url: str,
    body: bytes,
    *,
    content_type: str,
    timeout_s: float,
    limit_bytes: int,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """POST ``body`` and read the answer, whatever its status is.

    Args:
        timeout_s: for everything but the look-up of the name.
        limit_bytes: the longest body that is accepted.
        tls: for ``https``; None: the system's roots.

    Raises:
        StoreError: kind ``no_answer``: nothing came, or nothing usable. Whether the request was acted on is unknown.
        UsageError: as ``check_url``.
    """
    parts = check_url(url)
    where = f"{parts.scheme}://{parts.netloc}"
    try:
        answer = exchange(
            "POST",
            parts,
            body,
            headers={"Content-Type": content_type, **(headers or {})},
            end_s=time.monotonic() + timeout_s,
            limit_bytes=limit_bytes,
            tls=tls,
        )
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StoreError(
            f"{where}: no usable answer within {timeout_s:g} s: {type(error).__name__}: {str(error)[:200]}",
            kind="no_answer",
            where=where,
        ) from error
    if len(answer.body) > limit_bytes:
        raise StoreError(
            f"{where}: an answer of more than {limit_bytes} bytes; is this the right service?",
            kind="no_answer",
            where=where,
        )
    return answer


def exchange(
    method: str,
    parts: SplitResult,
    body: bytes | None,
    *,
    headers: Mapping[str, str],
    end_s: float,
    limit_bytes: int,
    tls: ssl.SSLContext | None = None,
    opened: Callable[[socket.socket], None] = lambda _: None,
) -> Answer:
    """Send one request and read the answer; of a longer body than ``limit_bytes`` one byte more than that.

    Args:
        end_s: by ``time.monotonic``, when all must be over; only the look-up of the name knows no limit.
        tls: for ``https``; None: the system's roots.
        opened: told of each socket before anything waits for it. Whoever shuts it down, on any thread, ends the
            request; what came by then may look like a whole answer. What it raises ends the request too.

    Raises:
        OSError, http.client.HTTPException, ValueError: there is no whole answer.
    """
    connection = (_Https if parts.scheme == "https" else http.client.HTTPConnection)(parts.netloc)
    timed = _Timed(_connect(parts, end_s, tls, opened), end_s, limit_bytes + AROUND_BYTES)
    try:
        connection.sock = timed
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, {**headers, "Connection": "close"})
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type", ""), response.read(limit_bytes + 1))
    finally:
        connection.close()
        timed.end()


class _Https(http.client.HTTPConnection):
    """Knows its port; the socket is given to it."""

    default_port = http.client.HTTPS_PORT


def _connect(
    parts: SplitResult, end_s: float, tls: ssl.SSLContext | None, opened: Callable[[socket.socket], None]
) -> socket.socket:
    """Connect to the first address that answers. One that does not leaves the others their share of the time."""
    secure = parts.scheme == "https"
    port = parts.port or (http.client.HTTPS_PORT if secure else http.client.HTTP_PORT)
    addresses = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    problem = OSError("the name has no address")
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        connected = socket.socket(family, kind, protocol)
        try:
            opened(connected)
            connected.settimeout(_left_s(end_s) / (len(addresses) - number))
            connected.connect(address)
        except OSError as error:
            connected.close()
            problem = error
            continue
        except BaseException:
            connected.close()
            raise
        return _secured(connected, str(parts.hostname), end_s, tls, opened) if secure else connected
    raise problem


def _secured(
    plain: socket.socket,
    host: str,
    end_s: float,
    tls: ssl.SSLContext | None,
    opened: Callable[[socket.socket], None],
) -> socket.socket:
    with plain:  # of no effect once it is wrapped
        plain.settimeout(_left_s(end_s))
        context = tls or ssl.create_default_context()
        secured = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    try:
        opened(secured)
        secured.do_handshake()  # within the limit as a whole, as the ssl module counts it
    except BaseException:
        secured.close()
        raise
    return secured


def _left_s(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the time is over")
    return left_s


class _Timed:
    """A socket all of whose operations end at one moment: a peer that sends a byte a second gains nothing.

    Nor does one that sends empty answers without end, which would cost this process its time.
    """

    def __init__(self, connected: socket.socket, end_s: float, limit_bytes: int) -> None:
        self._socket = connected
        self._end_s = end_s
        self._left_bytes = limit_bytes

    def sendall(self, data: Any) -> None:
        self._socket.settimeout(_left_s(self._end_s))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(cast(io.RawIOBase, _TimedReader(self)))

    def recv_into(self, buffer: Any) -> int:
        self._socket.settimeout(_left_s(self._end_s))
        count = self._socket.recv_into(buffer)
        self._left_bytes -= count
        if self._left_bytes < 0:
            raise OSError("an answer without end")
        return count

    def close(self) -> None:
        """Nothing yet: the connection lets go of it as soon as it has the answer's head."""

    def end(self) -> None:
        with suppress(OSError):
            self._socket.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.recv_into(buffer)
