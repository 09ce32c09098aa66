"""etcd as far as a log needs it: create a key that nobody has, and read one, over its JSON gateway (v3).

``create`` is one transaction: put the value if the key's create revision is 0, else give what is there. After any error
it is simply sent again, to the next endpoint: a first try that landed although its answer was lost is then met as
"there already, with these bytes". The same holds for one that lands late.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

from ciuic_async.errors import StoreError, UsageError
from ciuic_async.transparency.post import Answer, check_url, post

VALUE_LIMIT_BYTES = 1 << 20
"""etcd takes requests of 1.5 MiB unless it is told otherwise; the key and the transaction are in it too."""

_ANSWER_LIMIT_BYTES = 4 << 20  # a value in base64, with room for etcd servers that allow more
_FIRST_WAIT_S = 0.02
_MAX_WAIT_S = 0.5
_random = random.SystemRandom()  # not the module's own generator: its state belongs to training


class Etcd:
    """A cluster. Any thread may call.

    Args:
        endpoints: ``http://host:port`` or ``https://host:port`` of its members; tried in turn.
        user, password: for a cluster with authentication.
        tls: for ``https``; None: the system's roots.
        timeout_s: how long ``create`` tries.
        request_timeout_s: how long one member may take.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        user: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 15.0,
        request_timeout_s: float = 3.0,
    ) -> None:
        if not endpoints:
            raise UsageError("etcd needs at least one endpoint, host:port", kind="bad_ordering")
        for endpoint in endpoints:
            if check_url(endpoint).path not in ("", "/"):
                raise UsageError(f"{endpoint}: an etcd endpoint has no path", kind="bad_ordering")
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._credentials = None if user is None else {"name": user, "password": password or ""}
        self._tls = tls
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s
        self._mutex = threading.Lock()
        self._preferred = 0
        """The endpoint that answered last."""
        self._token: str | None = None

    def __repr__(self) -> str:
        return f"Etcd({', '.join(self._endpoints)})"

    def create(self, key: str, value: bytes) -> bytes:
        """Give ``key`` this value if it has none.

        Returns:
            What the key holds: ``value`` itself means that it is there because of this call, or of one like it.

        Raises:
            StoreError: kind ``etcd_unavailable`` (no majority answered in time) or ``etcd_refused``. Whether the key
                was created is unknown.
        """
        name = _encode(key.encode())
        request = {
            "compare": [{"key": name, "target": "CREATE", "result": "EQUAL", "createRevision": "0"}],
            "success": [{"requestPut": {"key": name, "value": _encode(value)}}],
            "failure": [{"requestRange": {"key": name}}],
        }
        answer = self._ask("/v3/kv/txn", request, self._timeout_s, _created)
        return value if answer is None else answer

    def get(self, key: str, *, timeout_s: float | None = None) -> bytes | None:
        """What ``key`` holds by the word of a majority; None when there is no such key. Errors as ``create``."""
        request = {"key": _encode(key.encode())}
        return self._ask("/v3/kv/range", request, timeout_s or self._timeout_s, _first_value)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _ask(self, path: str, request: dict[str, Any], timeout_s: float, understand: Any) -> bytes | None:
        """Send to one endpoint after the other until one gives an answer that can be understood."""
        end_s = time.monotonic() + timeout_s
        wait_s = _FIRST_WAIT_S
        body = json.dumps(request).encode()
        while True:
            refused = 0
            for _ in self._endpoints:
                with self._mutex:
                    number = self._preferred
                left_s = min(self._request_timeout_s, end_s - time.monotonic())
                try:
                    result: bytes | None = understand(self._send(self._endpoints[number], path, body, left_s))
                    return result
                except StoreError as error:
                    failure = error
                    refused += error.kind == "etcd_refused"
                with self._mutex:
                    if self._preferred == number:
                        self._preferred = (number + 1) % len(self._endpoints)
                if time.monotonic() >= end_s:
                    break
            if refused == len(self._endpoints):
                raise failure
            if time.monotonic() + wait_s >= end_s:
                raise StoreError(
                    f"etcd: no member of {', '.join(self._endpoints)} did what was asked within {timeout_s:g} s; "
                    f"does a majority run? The last answer: {failure}",
                    kind="etcd_unavailable",
                    where=self._endpoints[0],
                ) from failure
            time.sleep(_random.uniform(wait_s / 2, wait_s))
            wait_s = min(_MAX_WAIT_S, wait_s * 2)

    def _send(self, endpoint: str, path: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """One request to one member; logs in first where that is needed, and once more when the login has expired."""
        token = self._login(endpoint, timeout_s)
        answer = self._post(endpoint, path, body, timeout_s, token)
        if answer.status == 401 and token is not None:
            self._forget(token)
            answer = self._post(endpoint, path, body, timeout_s, self._login(endpoint, timeout_s))
        return _parse(answer, endpoint)

    def _login(self, endpoint: str, timeout_s: float) -> str | None:
        if self._credentials is None:
            return None
        with self._mutex:
            token = self._token
        if token is None:
            request = json.dumps(self._credentials).encode()
            answer = _parse(self._post(endpoint, "/v3/auth/authenticate", request, timeout_s, None), endpoint)
            token = answer.get("token")
            if not isinstance(token, str) or not token.isprintable():
                raise _unusable(endpoint, "a login without a token")
            with self._mutex:
                self._token = token
        return token

    def _forget(self, token: str) -> None:
        with self._mutex:
            if self._token == token:
                self._token = None

    def _post(self, endpoint: str, path: str, body: bytes, timeout_s: float, token: str | None) -> Answer:
        return post(
            endpoint + path,
            body,
            content_type="application/json",
            timeout_s=max(0.001, timeout_s),
            limit_bytes=_ANSWER_LIMIT_BYTES,
            headers={} if token is None else {"Authorization": token},
            tls=self._tls,
        )


def _parse(answer: Answer, endpoint: str) -> dict[str, Any]:
    """The JSON object of a good answer; an error for any other."""
    if answer.status != 200:
        # Who asks for the impossible is told so by all; a member without a leader, or one that is full, may recover.
        refused = 400 <= answer.status < 500 and answer.status not in (408, 429)
        detail = answer.body[:300].decode("utf-8", "replace").strip()
        raise StoreError(
            f"{endpoint}: status {answer.status}: {detail!r}",
            kind="etcd_refused" if refused else "etcd_unavailable",
            where=endpoint,
        )
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("header"), dict):
        raise _unusable(endpoint, f"{answer.body[:80]!r}")
    return value


def _created(answer: dict[str, Any]) -> bytes | None:
    """Of a transaction: None where it put the value, else what was there."""
    if answer.get("succeeded") is True:
        return None
    # Members leave out what is false or empty; an answer without what the key holds is none of ours.
    responses = answer.get("responses")
    first = responses[0] if isinstance(responses, list) and len(responses) == 1 else None
    found = (first.get("response_range") or first.get("responseRange")) if isinstance(first, dict) else None
    value = _first_value(found) if isinstance(found, dict) else None
    if value is None:
        raise _unusable("etcd", "a transaction that neither put the value nor found one")
    return value


def _first_value(answer: dict[str, Any]) -> bytes | None:
    """Of a range over one key: what it holds, None where there is no such key."""
    found = answer.get("kvs", [])
    if not found:
        return None
    first = found[0] if isinstance(found, list) and len(found) == 1 else None
    encoded = first.get("value", "") if isinstance(first, dict) else None
    try:
        if isinstance(encoded, str):
            return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise _unusable("etcd", "not the answer to a range over one key")


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unusable(where: str, found: str) -> StoreError:
    return StoreError(f"{where}: not an answer of etcd: {found}", kind="etcd_unavailable", where=where)
