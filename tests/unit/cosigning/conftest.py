"""A chain, witnesses for it, and who asks them."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.serving import Reply
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Cosigner
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.witness import Witness
from tests.witnesses import (
    QUICK,
    Address,
    CountingServer,
    Liar,
    Place,
    at_least,
    stop,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "chain"
    key = SigningKey.generate()
    monkeypatch.setenv("CIUIC_KEY", key.secret())
    with SnapshotChain(folder) as chain:
        chain.note("first")
        yield Place(folder, chain, key)


@pytest.fixture
def witness(place: Place, tmp_path: Path) -> Iterator[Callable[..., tuple[Address, CountingServer]]]:
    """Makes running witnesses that know the chain's key."""
    running: list[CountingServer] = []

    def make(
        name: str = "", state: Path | None = None, key: SigningKey | None = None, tls: ssl.SSLContext | None = None
    ) -> tuple[Address, CountingServer]:
        name = name or f"example.org/w{len(running)}"
        logs = [note.parse_vkey(vkey) for vkey in [*place.chain.keys(), place.key.vkey(place.origin)]]
        state = state or tmp_path / f"state{len(running)}"
        server = CountingServer(Witness(state, key or SigningKey.generate(), name, logs))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.start()
        running.append(server)
        return (name, server.witness.vkey, server.url), server

    yield make
    for server in running:
        stop(server)


@pytest.fixture
def cosigner(place: Place) -> Iterator[Callable[..., Cosigner]]:
    """Makes cosigners, and ends them."""
    made: list[Cosigner] = []

    def make(addresses: list[Address], quorum: int, **options: object) -> Cosigner:
        options.setdefault("pace", QUICK)
        log = Log(place.store, place.origin)
        made.append(Cosigner(place.store, log, addresses, at_least(quorum), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for item in made:
        item.close(0.0)


@pytest.fixture
def liar() -> Iterator[Callable[[Callable[[bytes], Reply]], tuple[Address, Liar]]]:
    """Makes servers that answer as told, under the name and a key of a witness."""
    running: list[Liar] = []

    def make(say: Callable[[bytes], Reply]) -> tuple[Address, Liar]:
        server = Liar(say)
        server.start()
        running.append(server)
        vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/liar"))
        return ("example.org/liar", vkey, server.url), server

    yield make
    for server in running:
        server.close()
