"""Collecting cosignatures: no witness can do harm."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ciuic_async.cli.serving import Reply
from ciuic_async.errors import StoreError, UsageError
from ciuic_async.transparency import note
from ciuic_async.transparency.asking import ANSWER_LIMIT_BYTES, WitnessConnection
from ciuic_async.transparency.cosigning import Cosigner, Pace
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.witness import request_body
from tests.witnesses import (
    WAIT_S,
    Place,
    at_least,
    lines_by,
)


def test_a_fork_is_final_and_kept(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A witness that cosigned another history of this very log refuses ours: an error is logged, both heads are kept
    on our side and on its, and it is not asked again. The others go on."""
    forked, server = witness()
    good, _ = witness()
    size = len(place.log())
    other = place.key.sign(place.origin, note.head_text(place.origin, size, bytes(32))).encode()
    assert server.witness.add_checkpoint(request_body(0, [], other)).status == 200
    item = cosigner([forked, good], 1, evidence=tmp_path / "evidence")
    with caplog.at_level(logging.ERROR, "ciuic_async"):
        assert item.wait(size, WAIT_S)
        assert item.settle(WAIT_S)
    assert "FORK" in caplog.text
    assert [status.forked for status in item.status()] == [True, False]
    kept = json.loads(next((tmp_path / "evidence").iterdir()).read_bytes())
    assert kept["refused"] == note.format_note(place.head().text, place.head().signatures[:1])
    assert kept["cosigned"].startswith(other.decode())
    assert next((server.witness._folder / "evidence").iterdir()).name.endswith(".0")
    asked = server.asked
    assert item.wait(place.add(), WAIT_S)
    assert item.settle(WAIT_S)
    assert server.asked == asked


def test_409_that_names_the_very_size_is_a_fork(place: Place, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """So said version 1.0.0 of the specification for another root of the same size: final, not retried."""
    address, server = liar(lambda body: Reply(409, body.partition(b"\n")[0].removeprefix(b"old ") + b"\n"))
    item = cosigner([address], 1)
    item.notice()
    assert item.settle(WAIT_S)
    assert item.status()[0].forked
    place.add()
    item.notice()
    assert item.settle(WAIT_S)
    assert server.asked == 1


def test_lying_witnesses_do_no_harm(place: Place, witness: Callable, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """Whatever the one answers, the other's signature is kept, nothing else is, and the liar is named in the status."""
    stranger = SigningKey.generate()
    elsewhere, target = liar(lambda body: Reply(200, b""))
    answers: dict[str, Callable[[bytes], Reply]] = {
        "nothing": lambda body: Reply(200, b""),
        "a stranger's line": lambda body: Reply(200, lines_by(stranger, "example.org/stranger", body)),
        "a line under its name by another key": lambda body: Reply(200, forged(body)),
        "no line": lambda body: Reply(200, b"hello\n"),
        "a whole note": lambda body: Reply(200, b"x\n\n" + lines_by(stranger, "example.org/liar", body)),
        "no text": lambda body: Reply(200, bytes(range(256))),
        "many lines": lambda body: Reply(200, 100 * lines_by(stranger, "example.org/stranger", body)),
        "too much": lambda body: Reply(200, bytes(ANSWER_LIMIT_BYTES + 1)),
        "elsewhere": lambda body: Reply(307, b"", headers={"Location": elsewhere[2] + "/add-checkpoint"}),
        "an error": lambda body: Reply(503, b"\x1b[2J come later\n"),
        "sizes that never fit": lambda body: Reply(409, b"0\n" if body.startswith(b"old 1\n") else b"1\n"),
        "a larger size": lambda body: Reply(409, b"9000\n"),
        "a size that is none": lambda body: Reply(409, b"9" * 100),
        "forbidden": lambda body: Reply(403, b"no\n"),
    }

    def forged(body: bytes) -> bytes:
        vkey = bad[1]
        line = stranger.cosign(vkey.name, "other\n0\nAAAA\n", 2_000_000_000)
        return note.format_note("", (note.Signature(vkey.name, vkey.key_id, line.signature),))[1:].encode()

    good, _ = witness()
    for what, say in answers.items():
        bad, server = liar(say)
        item = cosigner([bad, good], 1)
        assert item.wait(place.add(), WAIT_S), what
        assert item.settle(WAIT_S)
        status = item.status()[0]
        assert status.error, what
        assert status.error.isprintable(), what
        assert not status.forked, what
        assert server.asked, what
        item.close()
        assert [line.name for line in place.head().signatures] == [place.origin, good[0]], what
    assert target.asked == 0


def test_lines_of_others_beside_the_right_one_are_ignored(place: Place, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """A witness may answer with more lines than its own."""
    key, stranger = SigningKey.generate(), SigningKey.generate()
    (name, _, url), _ = liar(
        lambda body: Reply(200, lines_by(stranger, "example.org/else", body) + lines_by(key, "example.org/liar", body))
    )
    item = cosigner([(name, note.parse_vkey(key.cosigner(name)), url)], 1)
    assert item.wait(len(place.log()), WAIT_S)
    assert [line.name for line in place.head().signatures] == [place.origin, name]


@contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what it is told with one connection, until that is closed; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as connection:
                behave(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the connection was never closed"


def send_for_ever(connection: socket.socket, data: bytes, pause_s: float) -> None:
    """Until the other side is gone."""
    pause = threading.Event()
    while not pause.wait(pause_s):
        connection.sendall(data)


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 OK\r\nX-Drip: ", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["headers", "body", "body without an end"],
)
def test_an_answer_that_drips_is_cut_off(place: Place, cosigner: Callable, start: bytes) -> None:  # type: ignore[type-arg]
    """A byte now and then keeps a socket alive for ever, but not the request: it ends at its deadline."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        send_for_ever(connection, b"x", 0.02)

    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/drip"))
    with peer(drip) as url:
        item = cosigner([("example.org/drip", vkey, url)], 1, pace=Pace(request_s=0.3, retry_s=60.0))
        item.notice()
        assert item.settle(WAIT_S)
        assert "no whole answer within 0.3 s" in str(item.status()[0].error)


@pytest.mark.parametrize(
    "data", [1000 * b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + 80 * (b"X: " + 60000 * b"x" + b"\r\n")]
)
def test_an_answer_without_end_costs_no_time(data: bytes) -> None:
    """A witness that sends as fast as it can, and never a body, is left long before its time is up: whoever reads it
    takes that time from training."""
    with peer(lambda connection: send_for_ever(connection, data, 0.0)) as url:
        connection = WitnessConnection(url, WAIT_S)
        began_s = time.monotonic()
        with pytest.raises(StoreError, match="an answer without end") as caught:
            connection.add_checkpoint(b"")
        assert caught.value.kind == "witness_unreachable"
        assert time.monotonic() - began_s < WAIT_S / 2


@contextmanager
def nobody_accepts() -> Iterator[str]:
    """The URL of a server whose queue is full: connecting to it takes for ever."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as waiting:
        while True:
            other = waiting.enter_context(socket.socket())
            other.settimeout(0.2)
            try:
                other.connect(listener.getsockname())
            except TimeoutError:
                break
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def nobody_answers() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("server", "scheme"), [(nobody_accepts, "http"), (nobody_answers, "http"), (nobody_answers, "https")]
)
def test_closing_ends_a_request_wherever_it_hangs(
    place: Place,
    cosigner: Callable,  # type: ignore[type-arg]
    server: Callable[[], AbstractContextManager[str]],
    scheme: str,
) -> None:
    """While it connects, while it agrees on keys, while it waits for an answer: no thread is left, and no wait is as
    long as the request may take."""
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    with server() as address:
        item = cosigner([("w", vkey, f"{scheme}://{address}")], 1, pace=Pace(request_s=WAIT_S))
        began = threading.Event()
        connection = item._witnesses[0].connection
        opened = connection._opened
        connection._opened = lambda connected: (opened(connected), began.set())[0]
        item.notice()
        assert began.wait(WAIT_S)
        item.close(0.1)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-witness")]


def test_a_server_that_nobody_reaches_is_given_up_in_time() -> None:
    """Connecting counts too."""
    with nobody_accepts() as address, pytest.raises(StoreError, match=r"within 0\.3 s"):
        WitnessConnection(f"http://{address}", 0.3).add_checkpoint(b"")


def test_an_address_that_hangs_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch, liar: Callable) -> None:  # type: ignore[type-arg]
    """A name with two addresses, the first of which nobody answers at (a broken IPv6, say), is reached by the other."""
    (_, _, url), _ = liar(lambda body: Reply(200, b"here"))
    with nobody_accepts() as address:
        ports = [int(address.rpartition(":")[2]), int(url.rpartition(":")[2])]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert WitnessConnection(url, 2.0).add_checkpoint(b"").body == b"here"


def certificate(folder: Path) -> Path:
    """A key and its own certificate for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "witness")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "witness.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


def test_https(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A witness behind TLS is asked if its certificate is trusted, and not otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    (name, vkey, url), _ = witness(tls=context)
    address = (name, vkey, url.replace("http:", "https:"))
    item = cosigner([address], 1)
    item.notice()
    assert item.settle(WAIT_S)
    assert "CERTIFICATE_VERIFY_FAILED" in str(item.status()[0].error)
    item.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "witness.pem"))
    item = cosigner([address], 1)
    assert item.wait(len(place.log()), WAIT_S)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/",
        "http://",
        "http://u:p@host/",
        "http://host/?q",
        "http://host/#f",
        "http://host:99999/",
        "http://ho st/",
        "http://h/\n",
    ],
)
def test_urls_that_cannot_be(url: str) -> None:
    """Only http and https with a host, nothing that could smuggle a header; refused at once, no password repeated."""
    with pytest.raises(UsageError) as caught:
        WitnessConnection(url, 1.0)
    assert caught.value.kind == "witness_url"
    assert "u:p" not in str(caught.value)


def test_a_key_of_another_kind_is_refused(place: Place) -> None:
    """A log's key is no witness's."""
    vkey = note.parse_vkey(place.key.vkey(place.origin))
    with pytest.raises(UsageError):
        Cosigner(place.store, place.log(), [("x", vkey, "http://127.0.0.1:1")], at_least(1))
