"""Collecting cosignatures: the option ``trust``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ciuic_async.errors import IntegrityError, NotFoundError, SaveFailedError, UsageError
from ciuic_async.format import layout
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
