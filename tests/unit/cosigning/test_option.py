"""Collecting cosignatures: the option ``trust``."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import IntegrityError, NotFoundError, SaveFailedError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import note, witnessing
from ciuic_async.transparency.cosigning import Cosigner
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.policy import Group, Policy
from ciuic_async.transparency.policy import Witness as PolicyWitness
from ciuic_async.transparency.witnessing import Trust
from tests.witnesses import (
    WAIT_S,
    Place,
    at_least,
    stop,
)


def trusting(*witnesses: tuple[str, Vkey, str | None], needed: int = 1, **settings: object) -> Trust:
    """The option, with a quorum of ``needed``; 0: none."""
    known = tuple(PolicyWitness(*witness) for witness in witnesses)
    groups = (Group("q", needed, tuple(witness.name for witness in known)),) if needed else ()
    return Trust.parse({"policy": Policy((), known, groups, "q" if needed else None), **settings})


def test_required_witnesses(place: Place, witness: Callable) -> None:  # type: ignore[type-arg]
    """``committed`` returns once a quorum signed; without one it fails with a kind of its own, in bounded time, and
    says that the entry stays. ``async`` never waits."""
    address, server = witness()
    log = Log(place.store, place.origin)
    trust = trusting(address, witnesses="required", max_age="1h")
    item = trust.witnessing(place.store, log, timeout_s=WAIT_S)
    assert item is not None
    size = place.add()
    item.committed(size)
    assert place.size(place.witnessed()) == size
    item.close()
    stop(server)
    late = trust.witnessing(place.store, log, timeout_s=0.2)
    assert late is not None
    with pytest.raises(SaveFailedError, match="is in the chain") as caught:
        late.committed(place.add())
    assert caught.value.kind == "not_witnessed"
    late.close()
    soft = trusting(address).witnessing(place.store, log, timeout_s=0.0)
    assert soft is not None
    soft.committed(10**6)
    soft.close(0.0)
    assert soft.cosigner.witnessed_size < 10**6


def test_settings_that_cannot_be(place: Place, tmp_path: Path) -> None:
    """Unknown names, modes and ages, and a quorum that nobody can meet, are refused at once; no URL, nobody to ask."""
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    no_url = ("w", vkey, None)
    url = ("w", vkey, "http://127.0.0.1:1")
    refused: list[Callable[[], Trust]] = [
        lambda: trusting(url, wittnesses="async"),
        lambda: trusting(url, witnesses="sometimes"),
        lambda: trusting(url, max_age="soon"),
        lambda: trusting(url, max_age=-1),
        lambda: trusting(url, max_age=True),
        lambda: trusting(no_url, witnesses="required"),
        lambda: trusting(url, needed=2, witnesses="required"),
        lambda: trusting(url, needed=0, witnesses="required"),
        lambda: Trust.parse({"witnesses": "async"}),
        lambda: Trust.parse({"policy": tmp_path / "none"}),
    ]
    for make in refused:
        with pytest.raises(UsageError):
            make()
    with pytest.raises(IntegrityError):
        Trust.parse({"policy": "no policy\n"})
    assert trusting(no_url).witnessing(place.store, place.log()) is None
    file = tmp_path / "policy.txt"
    file.write_text(trusting(url).policy.format())
    assert Trust.parse({"policy": file}) == Trust.parse({"policy": file.read_text()}) == trusting(url)
    assert [witnessing.duration_s(value) for value in (1.5, "90s", "2m", "1h", "2d")] == [1.5, 90, 120, 3600, 172800]


def test_an_empty_log_has_nothing_to_witness(tmp_path: Path) -> None:
    """A notice without any entry is no error, and nobody is asked."""
    store = LocalStore(tmp_path / "empty")
    store.initialize()
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    item = Cosigner(store, Log(store, "example.org/log"), [("w", vkey, "http://127.0.0.1:1")], at_least(1))
    item.notice()
    assert item.settle(WAIT_S)
    assert item.status()[0].asked_s is None
    item.close()
    store.close()
    with pytest.raises(NotFoundError):
        store.read(layout.WITNESSED, 1000)


def test_a_url_that_nobody_can_be_asked_at_is_refused_at_once() -> None:
    """Who opens the chain is told, and not only a thread in the background; a password in it is not repeated."""
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    for url in ("http://u:secret@127.0.0.1/", "http://127.0.0.1/?q"):
        with pytest.raises(UsageError) as caught:
            trusting(("w", vkey, url))
        assert caught.value.kind == "witness_url"
        assert "secret" not in str(caught.value)


def test_a_commit_whose_head_could_not_be_signed_is_witnessed_all_the_same(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full for the moment between slot and log head: where witnesses are required the call still returns,
    with a quorum, once there is room."""
    address, _ = witness()
    overwrite = LocalStore.overwrite
    failed: list[str] = []

    def full_once(store: LocalStore, name: str, data: Buffer) -> None:
        if not failed and name == layout.LOG_HEAD:
            failed.append(name)
            raise StoreError(f"{name}: told to fail", where=name)
        overwrite(store, name, data)

    monkeypatch.setattr(LocalStore, "overwrite", full_once)
    policy = trusting(address).policy
    with SnapshotChain(place.folder, trust={"policy": policy, "witnesses": "required", "writers": "any"}) as chain:
        chain.note("more")
        size = chain.log_size
    assert failed
    assert place.size(place.head()) == place.size(place.witnessed()) == size


def test_who_waits_for_a_witness_outlasts_its_pause(place: Place) -> None:
    """A required witness that comes back after a long time is asked again well within what one save waits."""
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    item = trusting(("w", vkey, "http://127.0.0.1:1"), witnesses="required").witnessing(place.store, place.log())
    assert item is not None
    assert item.cosigner._pace.retry_max_s <= 30.0 / 2
    item.close()


FORKS = """
import os, sys, threading
from ciuic_async.chain import SnapshotChain
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Cosigner
from ciuic_async.transparency.log import Log

folder, vkey, url = sys.argv[1:]
with SnapshotChain(folder) as chain:
    log = Log(chain.store, chain.origin)
    item = Cosigner(chain.store, log, [("w", note.parse_vkey(vkey), url)], lambda signers: bool(signers))
    assert item.wait(1, 60.0) and item.settle(60.0)
    held, let_go = threading.Event(), threading.Event()

    def hold():  # as the threads of the object do now and then
        with item._changed:
            held.set()
            let_go.wait(60.0)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60.0)
    child = os.fork()
    if not child:
        item.notice()
        told = (item.wait(9, 60.0), item.settle(60.0), item.witnessed_size > 0, len(item.status()))
        item.close()
        os._exit(told != (False, True, True, 1))
    print(os.waitpid(child, 0)[1], flush=True)
    let_go.set()
    other.join()
    item.close()
"""


def test_a_forked_process_waits_for_nothing(place: Place, witness: Callable) -> None:  # type: ignore[type-arg]
    """The threads are not in the copy (a data loader's worker, say): there nothing is asked, waited for or locked."""
    address, server = witness()
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(place.folder), str(address[1]), address[2]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout == "0\n"
    assert server.asked == 1


def test_a_thread_that_the_system_refuses_is_started_later(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is raised, one warning says so, and the witness without a thread is asked once there is one for it."""
    address, server = witness()
    start = threading.Thread.start
    refuse = ["ciuic-witness-0", "ciuic-witness-0"]

    def scarce(thread: threading.Thread) -> None:
        if thread.name in refuse:
            refuse.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    item = cosigner([address], 1)
    item.notice()
    item.notice()
    assert not refuse
    assert server.asked == 0
    assert item.wait(len(place.log()), WAIT_S)
    assert caplog.text.count("can't start new thread") == 1
