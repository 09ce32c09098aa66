"""One witness over HTTP, as a client sees it: bounded answers, no redirects, and a deadline that holds for every byte.

A socket's own time limit starts anew with each byte. So whoever waits for several witnesses calls ``cut_off`` now and
then, which ends a request that is past its deadline, wherever it hangs (but for a name service that does not answer).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from ciuic_async.errors import StoreError, UsageError
from ciuic_async.transparency.witness import state_name

ANSWER_LIMIT_BYTES = 64 << 10
"""16 cosignature lines of the largest kind known, or a note."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Status and body of an answer."""

    status: int
    body: bytes


class WitnessConnection:
    """Requests to one witness, one at a time. ``cut_off`` may be called by any thread, the rest by one.

    Args:
        url: the prefix before ``/add-checkpoint``.
        request_s: for one request, from name lookup to the last byte.

    Raises:
        UsageError: kind ``witness_url``.
    """

    def __init__(self, url: str, request_s: float) -> None:
        self.url = url
        self._request_s = request_s
        self._mutex = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._deadline_s = float("inf")
        self._closed = False
        self._context: ssl.SSLContext | None = None
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _bad_url(url, str(error)) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise _bad_url(url, "neither http nor https, or more than host, port and path")
        if any(char <= " " or char > "~" for char in url):
            raise _bad_url(url, "other characters than printable ASCII")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._prefix = parts.path.rstrip("/")

    def add_checkpoint(self, body: bytes) -> Answered:
        """Ask for a cosignature.

        Raises:
            StoreError: kind ``witness_unreachable`` (no whole answer in time) or ``answer_too_large``.
        """
        return self._request("POST", "/add-checkpoint", body)

    def checkpoint(self, origin: str) -> Answered:
        """The newest head that it cosigned. Errors as ``add_checkpoint``."""
        return self._request("GET", f"/{state_name(origin)}/checkpoint", None)

    def cut_off(self) -> None:
        """End the request under way if its time is up."""
        with self._mutex:
            if self._connection is not None and (self._closed or time.monotonic() >= self._deadline_s):
                connected = self._connection.sock
                if connected is not None:
                    with suppress(OSError):
                        socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the request under way, and refuse further ones. Idempotent."""
        self._closed = True
        self.cut_off()

    @property
    def deadline_s(self) -> float:
        """When the request under way must have ended, by ``time.monotonic``; infinity where there is none."""
        with self._mutex:
            return self._deadline_s

    def _request(self, method: str, path: str, body: bytes | None) -> Answered:
        connection = self._connection_to_be()
        with self._mutex:
            self._connection = connection
            self._deadline_s = time.monotonic() + self._request_s
        try:
            if self._closed:
                raise OSError("closed")
            connection.connect()
            connection.request(method, self._prefix + path, body, {"Connection": "close"})
            response = connection.getresponse()
            content = response.read(ANSWER_LIMIT_BYTES + 1)
            if self._closed or time.monotonic() >= self.deadline_s:
                raise OSError("cut off")  # an answer without a length looks whole then
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= self.deadline_s
            reason = f"no whole answer within {self._request_s:g} s" if late else f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.url}: {reason[:200]}", kind="witness_unreachable", where=self.url) from error
        finally:
            with self._mutex:
                self._connection, self._deadline_s = None, float("inf")
            connection.close()
        if len(content) > ANSWER_LIMIT_BYTES:
            raise StoreError(
                f"{self.url}: an answer of more than {ANSWER_LIMIT_BYTES} bytes",
                kind="answer_too_large",
                where=self.url,
            )
        return Answered(response.status, content)

    def _connection_to_be(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._request_s)
        if self._context is None:
            self._context = ssl.create_default_context()
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._request_s, context=self._context)


def _bad_url(url: str, reason: str) -> UsageError:
    return UsageError(f"{url[:200]!r} cannot be the URL of a witness: {reason}", kind="witness_url")
