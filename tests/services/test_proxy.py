"""The proxy that the campaigns rely on: each fault is what its name says, and without one nothing is changed."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.services import proxy as faults
from tests.services.proxy import Proxy, proxy

CONTENT = os.urandom(200_000)


class Names(BaseHTTPRequestHandler):
    """A server that keeps what is put, answers ranges, and knows ``If-None-Match: *``."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, bytes]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        taken = self.headers["If-None-Match"] == "*" and self.path in self.kept
        if not taken:
            self.kept[self.path] = body
        self._say(412 if taken else 200, b"", ETag='"true"')

    def do_GET(self) -> None:
        body = self.kept.get(self.path)
        if body is None:
            self._say(404, b"no such name")
        elif (asked := self.headers["Range"]) is None:
            self._say(200, body)
        else:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            self._say(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}")

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def names() -> Iterator[str]:
    """Such a server, with one name; its endpoint."""
    handler = type("OwnNames", (Names,), {"kept": {"/there": CONTENT}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def between() -> Iterator[Proxy]:
    with names() as endpoint, proxy(endpoint, "key", "secret") as running:
        yield running


def connect(between: Proxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(between.endpoint).netloc, timeout=10)


def ask(
    between: Proxy, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request on a connection of its own."""
    connection = connect(between)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_without_faults_nothing_is_changed_and_all_is_counted(between: Proxy) -> None:
    """Bodies, status, headers and ranges pass as they are, several on one connection; methods, kinds, bytes count."""
    connection = connect(between)
    for number in range(3):
        connection.request("PUT", f"/{number}", CONTENT)
        assert connection.getresponse().read() == b""
        connection.request("GET", f"/{number}")
        assert connection.getresponse().read() == CONTENT
    connection.request("GET", "/absent")
    missing = connection.getresponse()
    assert (missing.status, missing.read()) == (404, b"no such name")
    connection.close()
    response, body = ask(between, "GET", "/there", Range="bytes=10-19")
    assert (response.status, response.headers["Content-Range"], body) == (206, "bytes 10-19/200000", CONTENT[10:20])
    assert between.requests == {"PUT": 3, "put": 3, "GET": 5, "get": 4, "range": 1}
    assert between.transferred_bytes == {"up": 600_000, "down": 600_000 + len("no such name") + 10}


def test_a_lost_answer_is_of_a_request_that_was_done(between: Proxy) -> None:
    """The client sees a connection that ends, the server has the object; the next request passes."""
    rule = between.fail(faults.lose_answer, "put", times=1)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(between, "PUT", "/lost", b"arrived")
    assert rule.hits == 1
    assert ask(between, "GET", "/lost")[1] == b"arrived"


@pytest.mark.parametrize("retry_after_s", [None, 2])
def test_a_storm_takes_its_share_and_the_server_hears_nothing(between: Proxy, retry_after_s: int | None) -> None:
    """About the given share is refused, the same ones for the same seed, with Retry-After only where asked for."""
    seen = []
    for _ in range(2):
        between.fail(faults.refuse(503, "SlowDown", retry_after_s), "create", share=0.5, seed=3)
        answers = [ask(between, "PUT", f"/storm{len(seen)}-{n}", b"x", If_None_Match="*")[0] for n in range(40)]
        between.calm()
        seen.append([answer.status for answer in answers])
        refused = [answer for answer in answers if answer.status == 503]
        wanted = None if retry_after_s is None else "2"
        assert {answer.headers["Retry-After"] for answer in refused} == {wanted}
    assert seen[0] == seen[1]
    assert 10 < seen[0].count(503) < 30
    assert ask(between, "GET", f"/storm0-{seen[0].index(503)}")[0].status == 404


def test_what_hangs_is_let_go_when_the_proxy_is_calmed(between: Proxy) -> None:
    """No answer comes as long as the fault lasts; afterwards the connection ends and others work."""
    rule = between.fail(faults.hang, "get")
    outcome: list[str] = []

    def client() -> None:
        try:
            ask(between, "GET", "/there")
            outcome.append("answered")
        except (http.client.HTTPException, ConnectionError) as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=client)
    thread.start()
    assert rule.hit.wait(10)
    assert outcome == []
    between.calm()
    thread.join(10)
    assert outcome
    assert outcome != ["answered"]
    assert ask(between, "GET", "/there")[1] == CONTENT


def test_a_delay_passes_on_later(between: Proxy) -> None:
    """The answer is the true one, and takes at least as long as told."""
    between.fail(faults.delay(0.2), "get")
    begin_s = time.monotonic()
    assert ask(between, "GET", "/there")[1] == CONTENT
    assert time.monotonic() - begin_s >= 0.2


def test_bodies_that_do_not_fit_their_length(between: Proxy) -> None:
    """One says more than comes, which a client notices; the other says less, and only who knows the size notices."""
    between.fail(faults.cut_body, "get", times=1)
    with pytest.raises(http.client.IncompleteRead):
        ask(between, "GET", "/there")
    between.fail(faults.understate_body, "get", times=1)
    assert ask(between, "GET", "/there")[1] == CONTENT[:100_000]


def test_ranges_that_are_not_what_was_asked_for(between: Proxy) -> None:
    """Half a range says which half; everything for a range is a 200; a flipped bit is one bit."""
    between.fail(faults.part_of_range, "range", times=1)
    response, body = ask(between, "GET", "/there", Range="bytes=100-199")
    assert (response.status, response.headers["Content-Range"]) == (206, "bytes 100-149/200000")
    assert body == CONTENT[100:150]
    between.fail(faults.whole_for_range, "range", times=1)
    response, body = ask(between, "GET", "/there", Range="bytes=100-199")
    assert (response.status, body) == (200, CONTENT)
    between.fail(faults.flip_bit, "range", times=1)
    body = ask(between, "GET", "/there", Range="bytes=100-199")[1]
    assert int.from_bytes(body) ^ int.from_bytes(CONTENT[100:200]) == 1 << 8 * 99


def test_another_etag(between: Proxy) -> None:
    """The object arrives, under an ETag that is not its own."""
    between.fail(faults.wrong_etag, "put", times=1)
    assert ask(between, "PUT", "/tagged", b"x")[0].headers["ETag"] == '"' + "0" * 32 + '"'
    assert ask(between, "PUT", "/tagged", b"x")[0].headers["ETag"] == '"true"'


def test_a_reset_in_mid_upload(between: Proxy) -> None:
    """The client's connection is reset while it sends, and the server never sees the object."""
    rule = between.fail(faults.reset_upload, "put", times=1)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(between, "PUT", "/reset", os.urandom(8_000_000))
    assert rule.hits == 1
    assert ask(between, "GET", "/reset")[0].status == 404


def test_conditions_can_be_taken_away(between: Proxy) -> None:
    """With the fault a second create overwrites; without it is refused."""
    assert ask(between, "PUT", "/once", b"first", If_None_Match="*")[0].status == 200
    assert ask(between, "PUT", "/once", b"second", If_None_Match="*")[0].status == 412
    between.fail(faults.ignore_conditions, "create")
    assert ask(between, "PUT", "/once", b"second", If_None_Match="*")[0].status == 200
    assert ask(between, "GET", "/once")[1] == b"second"


def test_the_bandwidth_has_a_limit(between: Proxy) -> None:
    """Bytes of all connections together pass no faster than told."""
    between.throttle.bytes_per_s = 1_000_000
    begin_s = time.monotonic()
    ask(between, "PUT", "/slow", CONTENT)
    ask(between, "GET", "/slow")
    assert time.monotonic() - begin_s >= 0.3
    between.calm()


def test_a_server_that_is_gone_ends_the_connection() -> None:
    """The client gets no answer, as from a machine that lost its server, and the proxy goes on."""
    with names() as endpoint:
        pass
    with proxy(endpoint) as alone:
        for _ in range(2):
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                ask(alone, "GET", "/there")
        assert alone.requests["GET"] == 2
