"""One HTTP request with a body and a bounded answer: for etcd and for timestamp authorities.

Whoever answers may be slow, lie or talk without end: the time is bounded as a whole and not for each read, the answer
has a limit, redirects are answers like others. Standard library only; each call has a connection of its own, so any
thread may call, and so may a child after a fork.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from ciuic_async.errors import StoreError, UsageError


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
    end_s = time.monotonic() + timeout_s
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=tls)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    timed: _Timed | None = None
    try:
        connection.connect()
        connection.sock = timed = _Timed(connection.sock, end_s)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        all_headers = {"Content-Type": content_type, "Connection": "close", **(headers or {})}
        connection.request("POST", target, body, all_headers)
        response = connection.getresponse()
        content = response.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise StoreError(
                f"{where}: an answer of more than {limit_bytes} bytes; is this the right service?",
                kind="no_answer",
                where=where,
            )
        return Answer(response.status, response.getheader("Content-Type", ""), content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StoreError(
            f"{where}: no usable answer within {timeout_s:g} s: {type(error).__name__}: {str(error)[:200]}",
            kind="no_answer",
            where=where,
        ) from error
    finally:
        connection.close()
        if timed is not None:
            timed.end()


class _Timed:
    """A socket all of whose operations end at one moment: a peer that sends a byte a second gains nothing."""

    def __init__(self, connected: socket.socket, end_s: float) -> None:
        self._socket = connected
        self._end_s = end_s

    def sendall(self, data: Any) -> None:
        self.set_time_left()
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(cast(io.RawIOBase, _TimedReader(self)))

    def recv_into(self, buffer: Any) -> int:
        self.set_time_left()
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        """Nothing yet: the connection lets go of it as soon as it has the answer's head."""

    def end(self) -> None:
        self._socket.close()

    def set_time_left(self) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time is over")
        self._socket.settimeout(left_s)


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.recv_into(buffer)
