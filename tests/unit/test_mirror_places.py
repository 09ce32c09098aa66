"""Chains and mirrors at places that do not answer for a while, spoil an answer, or show what they can do by writing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, SnapshotChain, StoreError
from ciuic_async import chain as chain_module
from ciuic_async.format import layout
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.mirroring import mirror as mirror_module
from ciuic_async.mirroring.copier import Copier, read_chain_file
from ciuic_async.mirroring.home import Homing, bring_home
from ciuic_async.pipeline.commit import resolve
from ciuic_async.pipeline.history import live_snapshots
from ciuic_async.pipeline.spoilt import read_again
from ciuic_async.stores.base import Store
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.stores.resolve import resolve as real_resolve
from ciuic_async.stores.wrappers import Fault, Faulty, Wrapper
from ciuic_async.transparency.log import Log
from ciuic_async.verify import verify_store
from tests.crash.faults import same, state_at

WAIT_S = 30.0


class Plan:
    """For ``Faulty``: what ``off`` says of a method and a name gets no answer; everything that was asked is kept."""

    def __init__(self) -> None:
        self.off: Callable[[str, str], bool] = lambda method, name: False
        self.asked: list[tuple[str, str]] = []

    def __call__(self, method: str, name: str) -> Fault | None:
        self.asked.append((method, name))
        return Fault(StoreError(f"{name}: no answer", kind="unreachable")) if self.off(method, name) else None


@pytest.fixture
def plan() -> Plan:
    """Of the place ``away://``."""
    return Plan()


@pytest.fixture
def away(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The place ``away://`` for whoever opens a chain."""
    place = Faulty(MemoryStore(), plan)

    def chosen(url: Any, _options: Any) -> Store:
        return place if url == "away://" else real_resolve(url)

    monkeypatch.setattr(chain_module, "resolve_store", chosen)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.01)
    return place


def saved(place: Path, *steps: int) -> list[str]:
    """A chain without a mirror; the ids of its snapshots."""
    with SnapshotChain(place) as chain:
        return [ciuic_async.save(state_at(step), chain).id for step in steps]


def copier(source: Store, mirror: Store) -> Copier:
    """Without a key: the head of a copy that is under way is not the matter here."""
    data = read_chain_file(source)
    assert data is not None
    return Copier(source, mirror, data)


def segments(method: str, name: str) -> bool:
    """A plan: the data of segments gets no answer."""
    return name.startswith(layout.SEGMENTS) and method in ("read", "read_into", "size")


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
def test_reading_tries_nothing_by_writing(mirrored: bool, away: Store, plan: Plan, tmp_path: Path) -> None:
    """Who opens a chain that has a mirror with ``create=False`` and reads needs no right to write at either place."""
    with SnapshotChain("away://", mirror=tmp_path / "other") as chain:
        ciuic_async.save(state_at(1), chain).wait_replicated(WAIT_S)
    plan.asked.clear()
    places = (tmp_path / "other", "away://") if mirrored else ("away://", tmp_path / "other")
    with SnapshotChain(places[0], create=False, mirror=places[1]) as chain:
        snapshot = chain.latest()
        assert snapshot is not None
        assert snapshot.replicated
        assert same(snapshot.load(), state_at(1))
    assert {method for method, _ in plan.asked} <= {"read", "read_into", "size", "list"}


def test_a_mirror_that_cannot_be_tried_stops_no_training(away: Store, plan: Plan, tmp_path: Path) -> None:
    """With a mirror that answers nothing at all, not even what it can do, a chain opens and snapshots are durable."""
    saved(tmp_path / "chain", 1)
    plan.off = lambda method, name: True
    with SnapshotChain(tmp_path / "chain", mirror="away://") as chain:
        second = ciuic_async.save(state_at(2), chain)
        assert not second.replicated
        plan.off = lambda method, name: False
        second.wait_replicated(WAIT_S)
    assert verify_store(away).problems == ()


def test_a_mirror_that_falls_silent_while_a_chain_opens(away: Store, plan: Plan, tmp_path: Path) -> None:
    """Where nothing is to be brought home an answer of the mirror that never comes does not keep the chain closed."""
    with SnapshotChain(tmp_path / "chain", mirror="away://") as chain:
        ciuic_async.save(state_at(1), chain).wait_replicated(WAIT_S)
    plan.off = lambda method, name: name == layout.WITNESSED
    with SnapshotChain(tmp_path / "chain", mirror="away://") as chain:
        assert len(chain) == 1
        plan.off = lambda method, name: False
        ciuic_async.save(state_at(2), chain).wait_replicated(WAIT_S)


@pytest.mark.damages
def test_a_way_home_that_breaks_off_is_no_beginning(away: Store, plan: Plan, tmp_path: Path) -> None:
    """With entries that only the mirror has, and that do not come, a chain does not open: what it would write from here
    on would be another history."""
    saved(tmp_path / "chain", 1)
    early = layout.slot(len(SnapshotChain(tmp_path / "chain", create=False).log()))
    with SnapshotChain(tmp_path / "chain", mirror="away://") as chain:
        ciuic_async.save(state_at(2), chain).wait_replicated(WAIT_S)
    for path in (tmp_path / "chain" / early, tmp_path / "chain" / layout.LOG_HEAD):
        path.unlink()
    plan.off = lambda method, name: method == "read" and name.startswith(layout.MANIFESTS)
    with pytest.raises(StoreError) as caught:
        SnapshotChain(tmp_path / "chain", mirror="away://")
    assert caught.value.kind == "unreachable"
    plan.off = lambda method, name: False
    with SnapshotChain(tmp_path / "chain", mirror="away://") as chain:
        assert len(chain) == 2


# --- out of reach is not lost -----------------------------------------------------------------------------------------


def test_a_chain_that_is_out_of_reach_is_not_called_damaged(plan: Plan, tmp_path: Path) -> None:
    """While the chain's own place does not answer nothing is copied and no snapshot is left out; then all arrives."""
    saved(tmp_path / "chain", 1, 2)
    mirror = MemoryStore()
    at_work = copier(Faulty(LocalStore(tmp_path / "chain"), plan), mirror)
    plan.off = segments
    with pytest.raises(StoreError) as caught:
        at_work.turn()
    assert caught.value.kind == "unreachable"
    assert at_work.lacking == {}
    assert at_work.replicated_size == 0
    plan.off = lambda method, name: False
    at_work.turn()
    assert at_work.lacking == {}
    assert verify_store(mirror).problems == ()


def test_segments_come_home_after_a_mirror_fell_silent(plan: Plan, tmp_path: Path) -> None:
    """A mirror that does not answer while segments come home ends that turn only: the next one brings them."""
    saved(tmp_path / "chain", 1, 2)
    mirror = MemoryStore()
    copier(LocalStore(tmp_path / "chain"), mirror).turn()
    home = LocalStore(tmp_path / "back")
    pair = FallbackStore(home, Faulty(mirror, plan))
    data = bring_home(home, pair.there, None, lambda log: None)
    assert data is not None
    homing = Homing(pair, Log(home, ChainFile.decode(data).origin))
    plan.off = segments
    with pytest.raises(StoreError):
        homing.turn()
    plan.off = lambda method, name: False
    homing.turn()
    assert verify_store(home).problems == ()


@pytest.mark.damages
def test_what_only_a_silent_mirror_has_is_not_passed_over(away: Store, plan: Plan, tmp_path: Path) -> None:
    """The newest snapshot's data is in the mirror alone, which does not answer: ``restore`` says so and does not take
    training back to an older snapshot. When the mirror answers the newest one is restored."""
    model = torch.nn.Linear(30, 30)
    with (
        SnapshotChain(tmp_path / "chain", mirror="away://") as chain,
        Checkpointer(chain, {"model": model}, every_steps=1) as ckpt,
    ):
        for _ in range(2):
            with torch.no_grad():
                model.weight += 1
            ckpt.step()
        ckpt.flush(WAIT_S, replicated=True)
        newest = chain.latest()
        assert newest is not None
    (tmp_path / "chain" / layout.segment(newest.id, 0, 0)).unlink()
    plan.off = segments
    again = torch.nn.Linear(30, 30)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with (
            SnapshotChain(tmp_path / "chain", mirror="away://") as chain,
            Checkpointer(chain, {"model": again}) as ckpt,
        ):
            with pytest.raises(StoreError, match="not known to be lost") as caught:
                ckpt.restore()
            assert caught.value.kind == "unreachable"
            plan.off = lambda method, name: False
            progress = ckpt.restore()
    assert progress is not None
    assert progress.step == 2
    assert again.weight.equal(model.weight)
    assert not [one for one in told if "passed over" in str(one.message)]


# --- what comes home --------------------------------------------------------------------------------------------------


def test_locators_that_are_good_here_are_not_exchanged(tmp_path: Path) -> None:
    """Locators are not signed. One that the mirror's keeper exchanged does not take the place of the chain's own, which
    retention goes by: neither of a snapshot that is whole here, nor of one whose segment comes home."""
    _, second = saved(tmp_path / "chain", 1, 2)
    local, mirror = LocalStore(tmp_path / "chain"), MemoryStore()
    copier(local, mirror).turn()
    log = Log(local, copier(local, mirror).origin)
    log.refresh()
    own: dict[str, bytes] = {}
    for line in live_snapshots(log):
        found = resolve(local, line.entry).locator
        name = layout.locator(line.entry.snapshot, 0)
        own[name] = local.read(name, 1 << 20)
        moved = {chunk: replace(place, offset_bytes=place.offset_bytes + 64) for chunk, place in found.chunks.items()}
        mirror.overwrite(name, replace(found, chunks=moved).encode())
    lost = layout.segment(second, 0, 0)
    local.delete(lost)
    pair = FallbackStore(local, mirror)
    Homing(pair, log).turn()
    assert local.size(lost) is not None
    assert {name: local.read(name, 1 << 20) for name in own} == own
    assert verify_store(local).problems == ()


# --- spoilt answers ---------------------------------------------------------------------------------------------------


class Spoiling(Wrapper):
    """Changes a bit of the first answer that holds data of a segment."""

    spoilt = False

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        super().read_into(name, offset_bytes, buffer)
        if not self.spoilt and name.startswith(layout.SEGMENTS):
            self.spoilt = True
            buffer.cast("B")[0] ^= 1


def test_a_spoilt_answer_leaves_no_snapshot_out(tmp_path: Path) -> None:
    """A chain at a remote place, of which one answer is spoilt on its way: that is no damage, and all is copied."""
    saved(tmp_path / "chain", 1)
    source, mirror = Spoiling(LocalStore(tmp_path / "chain")), MemoryStore()
    at_work = copier(source, mirror)
    at_work.turn()
    assert source.spoilt
    assert at_work.lacking == {}
    assert verify_store(mirror).problems == ()


@pytest.mark.parametrize("remote", [False, True])
def test_only_what_came_over_a_network_is_read_again(remote: bool, tmp_path: Path) -> None:
    """Two local disks would say the same again: damage there is read once; with a remote copy three times."""
    there: Store = MemoryStore() if remote else LocalStore(tmp_path / "there")
    tries: list[int] = []

    def read() -> None:
        tries.append(1)
        raise ciuic_async.IntegrityError("damaged")

    with pytest.raises(ciuic_async.IntegrityError):
        read_again(FallbackStore(LocalStore(tmp_path / "here"), there), "it", read)
    assert len(tries) == (3 if remote else 1)
