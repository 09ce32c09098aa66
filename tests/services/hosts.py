"""Two hosts on one machine: network namespaces, each with a cable of its own to a relay in front of a server.

Needs root and ``ip`` (iproute2). A cable can be pulled and put back.
"""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

NETWORK = "10.213.{number}.{host}"


@dataclass(frozen=True)
class Host:
    """A namespace with one cable."""

    name: str
    number: int
    endpoint: str
    """Where the server is, seen from here."""

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Run a program here; its output is read by the caller, line by line."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=folder,
            env={**os.environ, **environment, "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def pull(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        _ip("link", "set", f"{self.name}r", "down")

    def plug(self) -> None:
        """The cable is back."""
        _ip("link", "set", f"{self.name}r", "up")


def why_not() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "hosts are network namespaces, which need root and iproute2"
    name = f"ciuic{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


@contextmanager
def hosts(count: int, endpoint: str) -> Iterator[list[Host]]:
    """That many, each with a way to the server at ``endpoint``, which listens on this machine alone."""
    made: list[Host] = []
    relays: list[_Relay] = []
    try:
        for number in range(count):
            host = Host(f"cu{os.getpid() % 100000}n{number}", number, "")
            made.append(host)
            ours, theirs = (NETWORK.format(number=number, host=last) for last in (1, 2))
            _ip("netns", "add", host.name)
            _ip("link", "add", f"{host.name}r", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("addr", "add", f"{ours}/30", "dev", f"{host.name}r")
            _ip("link", "set", f"{host.name}r", "up")
            for arguments in (("addr", "add", f"{theirs}/30", "dev", "eth0"), ("link", "set", "eth0", "up")):
                _ip("-n", host.name, *arguments)
            relays.append(_Relay((ours, 0), endpoint))
            threading.Thread(target=relays[-1].serve_forever, daemon=True).start()
            made[-1] = Host(host.name, number, f"http://{ours}:{relays[-1].server_address[1]}")
        yield made
    finally:
        for relay in relays:
            relay.shutdown()
            relay.server_close()
        for host in made:
            with suppress(subprocess.CalledProcessError):  # its cable goes with it
                _ip("netns", "delete", host.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class _Relay(socketserver.ThreadingTCPServer):
    """Passes bytes on, both ways."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.target = (parts.hostname, parts.port)
        super().__init__(address, _Passing)


class _Passing(socketserver.BaseRequestHandler):
    server: _Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as target:
            back = threading.Thread(target=_pump, args=(target, self.request), daemon=True)
            back.start()
            _pump(self.request, target)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
