"""A real etcd cluster on this machine, writers that use it, and a proxy that spoils its answers."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

from ciuic_async.errors import CommitConflictError
from ciuic_async.format import entry
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import ordering
from ciuic_async.transparency.etcd import Etcd
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log

BINARY = shutil.which("etcd")
ROOT = Path(__file__).parents[2]
ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")


class CarelessStore(LocalStore):
    """A folder that cannot create a name once, as some object stores: of two racing writers the second one wins."""

    capabilities = Capabilities(orders_writers=False)

    def create(self, name: str, data: Buffer) -> None:
        if self.size(name) is not None:
            raise CommitConflictError(f"{name}: exists", where=name)
        self.overwrite(name, data)


# --- the cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """Members on 127.0.0.1, each a process of its own with its own folder."""

    def __init__(self, folder: Path, members: int, certificates: Path | None = None) -> None:
        assert BINARY is not None
        self._certificates = certificates
        ports = free_ports(2 * members)
        self.clients = [f"127.0.0.1:{port}" for port in ports[:members]]
        self._peers = [f"127.0.0.1:{port}" for port in ports[members:]]
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True)
        for number in range(members):
            self.start(number)
        self.wait()

    @property
    def endpoints(self) -> list[str]:
        return [f"{'https' if self._certificates else 'http'}://{client}" for client in self.clients]

    @property
    def url(self) -> str:
        """For ``ordering=``."""
        return f"etcd://{','.join(self.clients)}/test"

    def wait(self) -> None:
        """Until it answers."""
        tls = None
        if self._certificates is not None:
            tls = ssl.create_default_context(cafile=self._certificates / "ca.pem")
            tls.load_cert_chain(self._certificates / "peer.pem", self._certificates / "peer.key")
        assert Etcd(self.endpoints, timeout_s=60, tls=tls).get("ready") is None

    def start(self, number: int) -> None:
        """Start a member; one that ran before goes on from its folder."""
        assert BINARY is not None
        options = {
            "name": f"m{number}",
            "data-dir": str(self._folder / str(number)),
            "listen-client-urls": self.endpoints[number],
            "advertise-client-urls": self.endpoints[number],
            "listen-peer-urls": f"http://{self._peers[number]}",
            "initial-advertise-peer-urls": f"http://{self._peers[number]}",
            "initial-cluster": ",".join(f"m{n}=http://{peer}" for n, peer in enumerate(self._peers)),
            "log-level": "error",
        }
        if self._certificates is not None:
            files = {"trusted-ca-file": "ca.pem", "cert-file": "peer.pem", "key-file": "peer.key"}
            options |= {name: str(self._certificates / file) for name, file in files.items()}
            options["client-cert-auth"] = "true"
        with (self._folder / f"{number}.log").open("ab") as said:
            self._processes[number] = subprocess.Popen(
                [BINARY, *(f"--{name}={value}" for name, value in options.items())],
                stdout=said,
                stderr=said,
                env={"PATH": os.environ.get("PATH", "")},
            )

    def kill(self, number: int) -> None:
        """SIGKILL."""
        process = self._processes.pop(number)
        process.kill()
        process.wait()

    def pause(self, number: int) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._processes[number].send_signal(signal.SIGSTOP)

    def resume(self, number: int) -> None:
        self._processes[number].send_signal(signal.SIGCONT)

    def close(self) -> None:
        for number in list(self._processes):
            self.kill(number)


@contextmanager
def cluster(folder: Path, members: int, certificates: Path | None = None) -> Iterator[Cluster]:
    """A cluster that answers, for a ``with`` block.

    Args:
        certificates: a folder of ``ca.pem``, ``peer.pem`` and ``peer.key``: TLS, and clients must have a certificate.
    """
    running = Cluster(folder, members, certificates)
    try:
        yield running
    finally:
        running.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


# --- writers ----------------------------------------------------------------------------------------------------------


def line(text: str) -> bytes:
    """An entry that says ``text``."""
    return entry.PruneEntry(COMMON, (), text).encode()


def texts(log: Log) -> dict[str, int]:
    """What the entries say that are no keys, and where they are. None says it twice."""
    found: dict[str, int] = {}
    for index, item in log.entries():
        if isinstance(item, entry.PruneEntry):
            assert item.policy not in found, f"{item.policy} is there twice"
            found[item.policy] = index
    return found


def announcement(log: Log, key: SigningKey) -> bytes:
    """The entry that announces a key."""
    return entry.KeyEntry(COMMON, key.vkey(log.origin)).encode()


def append(log: Log, key: SigningKey, text: str) -> int:
    """Add an entry that says ``text``."""
    return log.append(lambda _: [line(text)], key, announce=lambda: announcement(log, key))


def write_for_ever(folder: str, url: str) -> None:
    """Append one entry after the other; say ``<index> <text>`` when each is acknowledged."""
    store = CarelessStore(folder)
    key = SigningKey.generate()
    log = Log(store, ORIGIN, ordering.parse(url, store, ORIGIN))
    while True:
        text = uuid4().hex
        print(append(log, key, text), text, flush=True)


def start_writer(folder: Path, url: str) -> subprocess.Popen[str]:
    """``write_for_ever`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.services.etcd", str(folder), url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


# --- a proxy that spoils answers --------------------------------------------------------------------------------------

Spoil = Callable[[BaseHTTPRequestHandler, int, bytes], None]
"""Given the request, and status and body of the true answer: answers as it likes."""


def pass_on(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    """The true answer."""
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


class Proxy:
    """Passes requests on to a member and spoils its answers as the list says, one by one; then passes them on."""

    def __init__(self, target: str) -> None:
        self.spoils: list[Spoil] = []
        self.answered = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                true = http.client.HTTPConnection(target, timeout=30)
                true.request("POST", self.path, body, {"Content-Type": "application/json"})
                response = true.getresponse()
                status, content = response.status, response.read()
                true.close()
                outer.answered += 1
                (outer.spoils.pop(0) if outer.spoils else pass_on)(self, status, content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """A proxy for a ``with`` block."""
    running = Proxy(target)
    try:
        yield running
    finally:
        running.close()


if __name__ == "__main__":
    write_for_ever(*sys.argv[1:])
