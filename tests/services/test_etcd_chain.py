"""A chain that a real etcd orders: what it says of itself, and who may not write to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import CommitConflictError, UsageError
from ciuic_async.fork import fork
from ciuic_async.format import layout
from ciuic_async.format.chain_file import ORDERING_ETCD
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import ordering
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.etcd import Etcd
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.ordering import EtcdOrdering
from tests.services.etcd import BINARY, ORIGIN, Cluster, append, cluster, texts

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no etcd here (Debian: apt-get install etcd-server)")


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("etcd") / "one", 1) as running:
        yield running


def listed(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_a_chain_of_an_etcd_takes_no_writer_that_goes_past_it(etcd: Cluster, tmp_path: Path) -> None:
    """Everybody reads and verifies it without an etcd; whoever would write without one is told so and changes nothing,
    gc included."""
    path = tmp_path / "chain"
    with SnapshotChain(path, ordering=etcd.url) as chain:
        first = ciuic_async.save({"t": torch.zeros(4)}, chain)
        assert chain.file.features_required == (ORDERING_ETCD,)
    before = listed(path)
    with SnapshotChain(path) as chain:
        assert [snapshot.id for snapshot in chain] == [first.id]
        assert torch.equal(first_of(chain), torch.zeros(4))
        assert chain.verify().ok
        for write in (
            lambda: chain.note("past etcd"),
            lambda: chain.tag("name", "latest"),
            lambda: chain.gc(orphan_age_s=0),
            lambda: Checkpointer(chain, {"t": torch.zeros(4)}),
        ):
            with pytest.raises(UsageError, match="CIUIC_ORDERING") as caught:
                write()
            assert caught.value.kind == "ordering_differs"
    assert listed(path) == before
    with SnapshotChain(path, ordering=etcd.url) as chain:
        chain.note("with etcd")
        assert chain.verify().ok


def held(etcd: Cluster, origin: str, size: int) -> bool:
    """Whether etcd has the slot after ``size`` entries."""
    claims = ordering.parse(etcd.url, MemoryStore(), origin)
    assert isinstance(claims, EtcdOrdering)
    return claims.read(layout.slot(size)) is not None


def first_of(chain: SnapshotChain) -> torch.Tensor:
    latest = chain.latest()
    assert latest is not None
    value = latest.load()["t"]
    assert isinstance(value, torch.Tensor)
    return value


def test_a_chain_of_its_place_takes_no_writer_of_an_etcd(etcd: Cluster, tmp_path: Path) -> None:
    """Nor the other way round; etcd is not written to, and the error repeats no password."""
    with SnapshotChain(tmp_path / "chain") as chain:
        chain.note("by the place")
        origin = chain.origin
    url = etcd.url.replace("etcd://", "etcd://user:geheim@")
    with SnapshotChain(tmp_path / "chain", ordering=url) as chain:
        assert len(chain.log()) == 2
        with pytest.raises(UsageError, match="ciuic chain fork") as caught:
            chain.note("by etcd")
    assert caught.value.kind == "ordering_differs"
    assert "geheim" not in str(caught.value)
    assert not held(etcd, origin, 2)


def test_a_fork_may_change_who_orders(etcd: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the place to an etcd and back: each new chain says who orders it, and keeps all snapshots."""
    ciuic_async.save({"t": torch.ones(4)}, tmp_path / "a")
    monkeypatch.setenv("CIUIC_ORDERING", etcd.url)
    fork(tmp_path / "a", tmp_path / "b", reason="more writers")
    with SnapshotChain(tmp_path / "b") as chain:
        assert chain.file.features_required == (ORDERING_ETCD,)
        chain.note("by etcd")
        assert held(etcd, chain.origin, 0)
    monkeypatch.setenv("CIUIC_ORDERING", "local")
    fork(tmp_path / "b", tmp_path / "c", reason="fewer")
    with SnapshotChain(tmp_path / "c") as chain:
        assert chain.file.features_required == ()
        chain.note("by the place")
        assert torch.equal(first_of(chain), torch.ones(4))


def copy_of(store: MemoryStore) -> MemoryStore:
    made = MemoryStore()
    for item in list(store.list()):
        made.create(item.name, store.read(item.name, 1 << 20))
    return made


def test_nothing_is_built_on_a_slot_that_the_store_holds_otherwise(etcd: Cluster) -> None:
    """A slot in etcd alone was read, and meanwhile it was claimed past etcd: the writer stops, the log stays whole.

    Opened again, it goes on behind what the store holds.
    """
    store, key = MemoryStore(), SigningKey.generate()
    client = Etcd(etcd.endpoints)
    append(Log(store, ORIGIN, EtcdOrdering(store, client, "differs")), key, "first")
    elsewhere, past = copy_of(store), copy_of(store)  # where two writers' files go who die at their slots
    append(Log(elsewhere, ORIGIN, EtcdOrdering(elsewhere, client, "differs")), key, "in etcd alone")
    append(Log(past, ORIGIN), key, "past etcd")
    reader = Log(store, ORIGIN, EtcdOrdering(store, client, "differs"))
    assert reader.refresh().size == 3
    store.create(layout.slot(2), past.read(layout.slot(2), 1 << 20))
    with pytest.raises(CommitConflictError) as caught:
        append(reader, key, "on top of it")
    assert caught.value.kind == "slot_differs"
    assert Etcd(etcd.endpoints).get(f"differs/{layout.slot(3)}") is None
    assert not audit_log(store, ORIGIN).problems
    again = Log(store, ORIGIN, EtcdOrdering(store, client, "differs"))
    assert append(again, key, "again") == 3
    assert texts(again) == {"first": 1, "past etcd": 2, "again": 3}
    assert not audit_log(store, ORIGIN).problems
