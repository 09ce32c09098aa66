"""``ciuic chain serve``: the log for strangers, byte for byte, and nothing else."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli import serving
from ciuic_async.cli.chain_serve import LogServer
from ciuic_async.cli.main import main
from ciuic_async.errors import UsageError
from ciuic_async.format import layout
from ciuic_async.transparency.receipt import Receipt


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[SnapshotChain]:
    """Two snapshots, one with a tag and a receipt, and notes enough for full and partial tiles."""
    place = tmp_path / "chain"
    ciuic_async.save({"weight": torch.arange(4.0)}, str(place))
    newest = ciuic_async.save({"weight": torch.ones(4)}, str(place), tags=["best"], metrics={"loss": 0.5})
    with SnapshotChain(place) as chain:
        target = chain.target()
        for _ in range(3):
            target.log.append(lambda log: 100 * [log.entry_bytes(0)], target.key, announce=target.announce)
        chain.note("last")
        head = chain.store.read(layout.LOG_HEAD, 10_000)
        path = target.log.inclusion(newest.index)
        chain.store.overwrite(layout.receipt(newest.id), Receipt(newest.index, tuple(path), head).encode())
        yield chain


@pytest.fixture
def server(chain: SnapshotChain) -> Iterator[LogServer]:
    server = LogServer(("127.0.0.1", 0), chain)
    server.start()
    yield server
    server.close()


def get(
    server: LogServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers; the path goes out as it is."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.headers)
    finally:
        connection.close()


def test_every_file_of_the_log_is_served_byte_for_byte(server: LogServer, chain: SnapshotChain) -> None:
    """Under the paths of C2SP and under the store's own; what never changes may be kept for ever."""
    names = [listed.name for listed in chain.store.list("log")]
    assert layout.tile(0, 0) in names
    assert layout.entry_bundle(1, 48) in names
    for name in names:
        data = chain.store.read(name, 1 << 24)
        for path in (f"/{name}", f"/{name.removeprefix('log/')}"):
            status, body, headers = get(server, path)
            assert (status, body) == (200, data)
            assert ("immutable" in headers["Cache-Control"]) == (name != layout.LOG_HEAD)
    status, body, headers = get(server, "/checkpoint")
    assert (status, headers["Cache-Control"]) == (200, "no-cache")
    assert headers["Content-Type"].startswith("text/plain")


def test_who_has_a_file_already_gets_no_bytes(server: LogServer) -> None:
    """ETag and If-None-Match; HEAD gives headers alone."""
    _, body, headers = get(server, "/checkpoint")
    tag = headers["ETag"]
    status, again, headers = get(server, "/checkpoint", headers={"If-None-Match": f'"x", W/{tag}'})
    assert (status, again, headers["ETag"]) == (304, b"", tag)
    assert get(server, "/checkpoint", headers={"If-None-Match": '"x"'})[:2] == (200, body)
    status, nothing, headers = get(server, "/checkpoint", "HEAD")
    assert (status, nothing, headers["Content-Length"]) == (200, b"", str(len(body)))


REFUSED = [
    "/ciuic.json",
    "/segments/",
    "/log",
    "/log/",
    "/log/commit",
    "/../ciuic.json",
    "/log/../ciuic.json",
    "/tile/../../ciuic.json",
    "/tile/%2e%2e/%2e%2e/ciuic.json",
    "/log/%2e%2e/ciuic.json",
    "//etc/passwd",
    "/tile/0/000/",
    "/tile/00/000",
    "/tile/64/000",
    "/tile/0/000.p/0",
    "/tile/0/000.p/256",
    "/tile/0/999",
    "/checkpoint/",
    "/receipts/",
    "/receipts/../ciuic.json",
    "/receipts/00000000000000000000",
    "/snapshots/",
    "/snapshots/nothing",
    "/snapshots/step:",
    "/snapshots/%00",
    "/snapshots/..%2f..%2fetc%2fpasswd",
    "/x" + "y" * 2000,
]


def test_nothing_else_is_served(server: LogServer, chain: SnapshotChain) -> None:
    """No training data, no names outside the log, however they are written; nothing can be sent."""
    data = [listed.name for folder in ("segments", "manifests", "locators") for listed in chain.store.list(folder)]
    assert data
    for path in (*REFUSED, *(f"/{name}" for name in data), *(f"/log/../{name}" for name in data)):
        assert get(server, path)[0] == 404, path
    for method, code in (("POST", 405), ("PUT", 501), ("DELETE", 501), ("OPTIONS", 501)):
        assert get(server, "/checkpoint", method)[0] == code


def test_facts_snapshots_and_receipts(server: LogServer, chain: SnapshotChain) -> None:
    """The list is that of ``ciuic log --json``; one snapshot is found by every kind of ref; receipts are files."""
    facts = json.loads(get(server, "/")[1])
    assert facts == {"origin": chain.origin, "size": len(chain.log()), "vkeys": chain.keys()}
    listed = json.loads(get(server, "/snapshots")[1])
    assert listed == chain.log()
    assert json.loads(get(server, "/snapshots?limit=3")[1]) == chain.log()[-3:]
    newest = chain.get("latest")
    for ref in ("latest", "best", "best:loss", newest.id[:6], "best%3Aloss"):
        status, body, headers = get(server, f"/snapshots/{ref}")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert json.loads(body)["id"] == newest.id
    for path in (f"/receipts/{newest.id}", f"/receipts/{newest.id}.tlog-proof"):
        assert get(server, path)[1] == chain.store.read(layout.receipt(newest.id), 10_000)
    chain.note("later")
    assert json.loads(get(server, "/")[1])["size"] == facts["size"] + 1


@pytest.mark.damages
def test_damage_is_an_error_of_the_server_not_its_end(
    server: LogServer, chain: SnapshotChain, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read is a 500 without details for the asker, a message here, and the next is answered."""
    name = layout.tile(0, 1, 48)
    path = Path(chain.url) / name
    path.unlink()
    path.mkdir()
    status, body, _ = get(server, f"/{name}")
    assert (status, body) == (500, b"internal error\n")
    assert name in capfd.readouterr().err
    assert get(server, "/checkpoint")[0] == 200


def test_too_many_askers_are_told_to_come_again(server: LogServer) -> None:
    """Threads are bounded: with all of them waiting for a request that does not come, the next is refused at once;
    when they are gone everything is as before. Closing ends those that hang."""
    idle = []
    while len(idle) < serving.MAX_THREADS:
        idle.append(socket.create_connection((server.server_name, server.server_port)))
    with socket.create_connection((server.server_name, server.server_port)) as refused:
        assert refused.recv(100).startswith(b"HTTP/1.1 503 ")
    workers = [thread for thread in threading.enumerate() if thread.name == "ciuic-http"]
    assert len(workers) <= serving.MAX_THREADS + 1
    for connection in idle[1:]:
        connection.close()
    for thread in workers:
        if len([item for item in workers if item.is_alive()]) <= 2:
            break
        thread.join(0.2)
    assert get(server, "/checkpoint")[0] == 200
    idle[0].close()


def test_a_request_that_drips_is_cut_off(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is bounded for a whole request, not only between two bytes."""
    monkeypatch.setattr(serving, "REQUEST_S", 0.3)
    with socket.create_connection((server.server_name, server.server_port), timeout=60) as slow:
        slow.sendall(b"GET /checkpoint HTTP/1.1\r\n")
        over = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not over.wait(0.02):
                    slow.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with suppress(ConnectionResetError):
                assert slow.recv(100) == b""
        finally:
            over.set()
            thread.join()


def test_the_command(chain: SnapshotChain, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints its URL, serves, logs a line a request on stderr, and ends with 0 when told to."""
    command = [sys.executable, "-m", "ciuic_async.cli.main", "chain", "serve", chain.url, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().split()[1]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.request("GET", "/checkpoint")
        assert connection.getresponse().read() == chain.store.read(layout.LOG_HEAD, 10_000)
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "127.0.0.1 GET /checkpoint HTTP/1.1 200" in process.stderr.read()
    assert main(["chain", "serve", chain.url + "-nothing", "--port", "0"]) == 3
    assert main(["chain", "serve", chain.url, "--port", "99999"]) == 2
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), (":0", ("127.0.0.1", 0)), ("[::1]:5000", ("::1", 5000)), ("h:1", ("h", 1))],
)
def test_addresses(given: str, meant: tuple[str, int]) -> None:
    """Host and port; what is neither is a usage error."""
    assert serving.parse_address(given) == meant
    for wrong in ("", "host", "host:", "host:x", "host:70000", "host:-1"):
        with pytest.raises(UsageError):
            serving.parse_address(wrong)
