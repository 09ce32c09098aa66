"""Witnesses for tests: real ones, in this process and in one of their own, and such as answer what they are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.chain_witness import WitnessServer
from ciuic_async.cli.serving import BoundedServer, Handler, Reply
from ciuic_async.format import layout
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Pace
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.witness import Witness

QUICK = Pace(request_s=20.0, retry_s=0.01, retry_max_s=0.05)
WAIT_S = 60.0

Address = tuple[str, Vkey, str]


def at_least(count: int) -> Callable[[set[Vkey]], bool]:
    return lambda signers: len(signers) >= count


class CountingServer(WitnessServer):
    """A real witness; ``asked`` counts connections."""

    def __init__(self, witness: Witness) -> None:
        super().__init__(("127.0.0.1", 0), witness)
        self.asked = 0

    def process_request(self, request: object, client_address: object) -> None:
        self.asked += 1
        super().process_request(request, client_address)


class Liar(BoundedServer):
    """Answers whatever ``say`` gives for a request's body; ``asked`` counts."""

    def __init__(self, say: Callable[[bytes], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _LiarHandler)
        self.say = say
        self.asked = 0


class _LiarHandler(Handler):
    methods: ClassVar[tuple[str, ...]] = ("GET", "HEAD", "POST")
    server: Liar

    def reply(self) -> Reply:
        self.server.asked += 1
        body = self.read_body(1 << 20) if self.command == "POST" else b""
        return body if isinstance(body, Reply) else self.server.say(body)


@dataclass
class Place:
    """A chain with entries, and its witnesses."""

    folder: Path
    chain: SnapshotChain
    key: SigningKey

    @property
    def store(self) -> Store:
        return self.chain.store

    @property
    def origin(self) -> str:
        return self.chain.origin

    def add(self, text: str = "more") -> int:
        """One entry; the log's size after it."""
        self.chain.note(text)
        return self.chain.log_size

    def save(self) -> str:
        """One snapshot; its id."""
        return ciuic_async.save({"weight": torch.arange(4.0)}, str(self.folder)).id

    def head(self) -> note.Note:
        return note.parse(self.store.read(layout.LOG_HEAD, note.LIMIT_BYTES), "head")

    def witnessed(self) -> note.Note:
        return note.parse(self.store.read(layout.WITNESSED, note.LIMIT_BYTES), "witnessed")

    def size(self, found: note.Note) -> int:
        return note.parse_head(found.text, self.origin, "head")[0]

    def log(self) -> Log:
        log = Log(self.store, self.origin)
        log.refresh()
        return log


def stop(server: CountingServer) -> None:
    server.close()
    server.witness.close()


def signers(found: note.Note, addresses: list[Address]) -> int:
    """How many of these witnesses signed; fails when one of their signatures does not hold."""
    known = {(vkey.name, vkey.key_id): vkey for _, vkey, _ in addresses}
    lines = [line for line in found.signatures if (line.name, line.key_id) in known]
    assert all(known[line.name, line.key_id].verifies(found.text, line.signature) for line in lines)
    return len(lines)


def lines_by(key: SigningKey, name: str, body: bytes, text: str | None = None) -> bytes:
    """A cosignature line by ``name`` under the head in a request, or under ``text``."""
    own = note.parse(body.partition(b"\n\n")[2], "request").text
    line = key.cosign(name, own if text is None else text, 2_000_000_000)
    return note.format_note("", (line,))[1:].encode()


class Process:
    """A witness in a process of its own, by the command line."""

    def __init__(self, state: Path, name: str, vkey: str) -> None:
        command = [sys.executable, "-m", "ciuic_async.cli.main", "chain", "witness", "--state", str(state)]
        self.process = subprocess.Popen(
            [*command, "--name", name, "--log", vkey], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        facts = dict(self.process.stdout.readline().strip().split(" ", 1) for _ in range(2))
        self.address: Address = (name, note.parse_vkey(facts["vkey"]), facts["url"])

    def kill(self) -> None:
        self.process.kill()
        with self.process:
            self.process.wait(30)
