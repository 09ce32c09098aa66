"""One witness over HTTP, as a client sees it: bounded answers, no redirects, and a deadline that holds for every byte.

A request can be ended from outside, wherever it hangs: connecting, in the middle of an answer (but not while a name
service does not answer).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from ciuic_async.errors import StoreError, UsageError
from ciuic_async.transparency.post import check_url, exchange
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
        self._socket: socket.socket | None = None
        self._deadline_s = float("inf")
        self._closed = False
        self._context: ssl.SSLContext | None = None
        try:
            parts = check_url(url)
        except UsageError as error:
            raise UsageError(f"no URL of a witness: {error}", kind="witness_url") from None
        if parts.query or parts.fragment:
            raise UsageError(
                f"{url[:200]!r} cannot be the URL of a witness: expected host, port and path, found more",
                kind="witness_url",
            )
        self._parts = parts._replace(path=parts.path.rstrip("/"))

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
            if self._socket is not None and (self._closed or time.monotonic() >= self._deadline_s):
                with suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not the TLS one's, which would talk first

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
        if self._context is None and self._parts.scheme == "https":
            self._context = ssl.create_default_context()
        end_s = time.monotonic() + self._request_s
        with self._mutex:
            self._deadline_s = end_s
        try:
            answer = exchange(
                method,
                self._parts._replace(path=self._parts.path + path),
                body,
                headers={},
                end_s=end_s,
                limit_bytes=ANSWER_LIMIT_BYTES,
                tls=self._context,
                opened=self._opened,
            )
            self._check_open()  # what was cut off may look whole
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= end_s
            reason = f"no whole answer within {self._request_s:g} s" if late else f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.url}: {reason[:200]}", kind="witness_unreachable", where=self.url) from error
        finally:
            with self._mutex:
                self._socket, self._deadline_s = None, float("inf")
        if len(answer.body) > ANSWER_LIMIT_BYTES:
            raise StoreError(
                f"{self.url}: an answer of more than {ANSWER_LIMIT_BYTES} bytes",
                kind="answer_too_large",
                where=self.url,
            )
        return Answered(answer.status, answer.body)

    def _opened(self, connected: socket.socket) -> None:
        with self._mutex:
            self._socket = connected
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("cut off")
