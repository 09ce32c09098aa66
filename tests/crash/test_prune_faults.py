"""Pruning with re-basing: any call to the store fails, the pruner dies at any call, others write and prune meanwhile.

Whatever happens, every snapshot that is kept reads back bit for bit, verify finds nothing, and the next prune ends
where an undisturbed one ends.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, PendingSnapshot, SaveFailedError, SnapshotChain
from ciuic_async import chain as chain_module
from ciuic_async.errors import StoreError
from ciuic_async.format import layout
from ciuic_async.stores.memory import MemoryStore
from tests.crash.faults import LONG, same, spread
from tests.crash.test_store_faults import FaultyStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if LONG else 240)]

KEPT = 2
SNAPSHOTS = 4


class DyingStore(FaultyStore):
    """From the ``at``-th call on nothing works: the process is as good as killed."""

    def call(self, what: str, real: Callable[..., Any], *args: Any) -> Any:
        self.calls.append(what)
        if self.at is not None and len(self.calls) >= self.at:
            raise StoreError(f"{what}: the process is dead", kind="unavailable", where=what)
        return real(*args)


class InterruptedStore(FaultyStore):
    """``meanwhile`` is called right before the ``at``-th call; calls under the store's lock do not count."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.meanwhile: Callable[[], object] = lambda: None
        self._locked = False

    def call(self, what: str, real: Callable[..., Any], *args: Any) -> Any:
        if not self._locked:
            self.calls.append(what)
            if len(self.calls) == self.at:
                self.meanwhile()
        return real(*args)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self.inner.lock():
            self._locked = True
            try:
                yield
            finally:
                self._locked = False


class Places:
    """What ``SnapshotChain("...")`` opens, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stores: dict[str, Any] = {}
        monkeypatch.setattr(chain_module, "resolve_store", lambda url, _options: self.stores[str(url)])

    def open(self, store: Any) -> SnapshotChain:
        name = f"store-{len(self.stores)}"
        self.stores[name] = store
        return SnapshotChain(name)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(monkeypatch)


def copy_of(store: MemoryStore) -> MemoryStore:
    # Another life of the chain: what was pinned of the ones before would contradict it.
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)
    copied = MemoryStore()
    copied._files = dict(store._files)
    return copied


class Training:
    """A state with a tensor that changes little (deltas), one that stays, and one that is another each time."""

    def __init__(self, chain: SnapshotChain) -> None:
        self.state: dict[str, Any] = {
            "weights": torch.randn(20_000, generator=torch.Generator().manual_seed(1)),
            "frozen": torch.randn(20_000, generator=torch.Generator().manual_seed(2)),
            "noise": torch.zeros(0),
        }
        self.saved: dict[str, dict[str, Any]] = {}
        self.steps = 0
        self.checkpointer = Checkpointer(chain, self.state, rng=False, codec="smallest", frozen=["frozen"])

    def save(self) -> None:
        """Raises SaveFailedError."""
        self.finish(self.begin())

    def finish(self, pending: PendingSnapshot) -> None:
        """Wait for it. Raises SaveFailedError."""
        self.saved[pending.wait_durable(60).id] = {name: tensor.clone() for name, tensor in self.state.items()}

    def begin(self) -> PendingSnapshot:
        self.steps += 1
        self.state["weights"].mul_(1 + 1e-6)
        self.state["noise"] = torch.randn(80_000, generator=torch.Generator().manual_seed(100 + self.steps))
        return self.checkpointer.save()


@pytest.fixture
def finished(places: Places) -> tuple[MemoryStore, dict[str, dict[str, Any]]]:
    """A chain of which half is to go, and what its snapshots hold."""
    store = MemoryStore()
    training = Training(places.open(store))
    with training.checkpointer:
        for _ in range(SNAPSHOTS):
            training.save()
    return store, training.saved


def judge(chain: SnapshotChain, saved: dict[str, dict[str, Any]]) -> None:
    """What is there is sound: verify says so, and so does every byte."""
    report = chain.verify()
    assert report.ok, report.problems
    living = list(chain)
    assert living
    for snapshot in living:
        if snapshot.id in saved:
            assert same(snapshot.load(), saved[snapshot.id]), snapshot.id


def owners(store: MemoryStore) -> set[str | None]:
    return {layout.owner(file.name) for file in store.list(layout.SEGMENTS)}


@pytest.mark.parametrize("how", ["refused", "answer lost", "dies"])
def test_any_call_of_a_prune_may_fail(
    places: Places, finished: tuple[MemoryStore, dict[str, dict[str, Any]]], how: str
) -> None:
    """One call fails before or after it took effect, or the pruner dies there: what is kept is whole, and the next
    prune frees all that an undisturbed one frees."""
    store, saved = finished
    clean = FaultyStore(copy_of(store))
    undisturbed = places.open(clean)
    clean.calls.clear()
    assert undisturbed.prune(KeepLatest(KEPT)).moved_bytes > 0
    assert owners(clean.inner) == set(list(saved)[-KEPT:])
    for position in spread(len(clean.calls), 12):
        kind = DyingStore if how == "dies" else FaultyStore
        faulty = kind(copy_of(store), None, after=how == "answer lost")
        chain = places.open(faulty)
        faulty.calls.clear()
        faulty.at = position
        try:
            _attempt(chain)
            faulty.at = None
            fresh = places.open(faulty.inner)
            judge(fresh, saved)
            assert set(list(saved)[-KEPT:]) <= {snapshot.id for snapshot in fresh}
            fresh.prune(KeepLatest(KEPT))
            assert [snapshot.id for snapshot in fresh] == list(saved)[-KEPT:]
            assert owners(faulty.inner) == owners(clean.inner)
            fresh.gc(orphan_age_s=0)
            judge(fresh, saved)
        except BaseException as error:
            error.add_note(f"call {position}: {faulty.calls[position - 1 : position]}")
            raise


def _attempt(chain: SnapshotChain) -> None:
    try:
        chain.prune(KeepLatest(KEPT))
    except StoreError as error:
        if error.kind != "unavailable":
            raise


def test_somebody_may_save_at_any_moment_of_a_prune(
    places: Places, finished: tuple[MemoryStore, dict[str, dict[str, Any]]]
) -> None:
    """A whole save by another process, which leans on the latest, between any two calls of the pruner."""
    store, saved = finished
    clean = InterruptedStore(copy_of(store))
    undisturbed = places.open(clean)
    clean.calls.clear()
    undisturbed.prune(KeepLatest(KEPT))
    for position in spread(len(clean.calls), 12):
        shared = InterruptedStore(copy_of(store))
        chain, other = places.open(shared), places.open(shared.inner)
        shared.calls.clear()
        shared.at = position
        mine: list[str] = []
        state = saved[list(saved)[-1]]
        shared.meanwhile = lambda other=other, mine=mine, state=state: mine.append(  # type: ignore[misc]
            ciuic_async.save(state, other).id
        )
        chain.prune(KeepLatest(KEPT))
        assert len(mine) == 1
        judge(chain, saved | {mine[0]: state})
        assert mine[0] in {snapshot.id for snapshot in chain}


@pytest.mark.parametrize("then", ["prune", "prune, gc", "prune twice"])
def test_somebody_may_prune_at_any_moment_of_a_save(places: Places, then: str) -> None:
    """A whole prune by another process between any two calls of a training's save: all that is durable is whole, and of
    all saves at most one fails."""
    shared = InterruptedStore(MemoryStore())
    count = _interrupted_save(places, shared, None, then)
    assert count >= 20
    for position in spread(count, 7):
        shared = InterruptedStore(MemoryStore())
        try:
            _interrupted_save(places, shared, position, then)
        except BaseException as error:
            error.add_note(f"call {position} of {count}: {shared.calls[-1:]}")
            raise


def _interrupted_save(places: Places, shared: InterruptedStore, position: int | None, then: str) -> int:
    """Three saves, a fourth during which somebody prunes, a fifth; the number of calls of the fourth."""
    training = Training(places.open(shared))
    other = places.open(shared.inner)

    def meanwhile() -> None:
        assert other.prune(KeepLatest(1)).pruned
        if then == "prune, gc":
            other.gc()
        if then == "prune twice":
            ciuic_async.save({"unrelated": torch.zeros(3)}, other)
            other.prune(KeepLatest(1))

    with training.checkpointer:
        for _ in range(3):
            training.save()
        shared.calls.clear()
        shared.meanwhile = meanwhile
        shared.at = position
        failed = not _saved(training)
        calls = len(shared.calls)
        shared.at = None
        judge(other, training.saved)
        assert _saved(training) or (then == "prune twice" and not failed), "the parent is gone: one fails, no more"
        assert failed or _saved(training)
        judge(other, training.saved)
    return calls


def test_a_save_that_waited_goes_on_at_any_moment_of_a_prune(places: Places) -> None:
    """A save stops at any call, a prune begins, stops at any of its calls, and there the save goes on to its end: what
    is durable is whole, whichever of the two claimed first."""
    saving, pruning = _both(places, None, None)
    outcomes = [_both(places, p, q) for p in spread(saving, 4) for q in spread(pruning, 5)]
    assert outcomes.count((0, 0)) > len(outcomes) / 2, "most become durable: what was moved is followed"


def _both(places: Places, p: int | None, q: int | None) -> tuple[int, int]:
    """How many calls the save and the prune took; with ``p`` and ``q`` 0, and whether the save failed."""
    waiting = InterruptedStore(MemoryStore())
    reached, go_on = threading.Event(), threading.Event()
    pruner = InterruptedStore(waiting.inner)
    training = Training(places.open(waiting))
    with training.checkpointer:
        for _ in range(3):
            training.save()
        other = places.open(pruner)
        failed = []

        def finish() -> None:
            go_on.set()
            failed.append(not _finished(training, pending))

        def wait() -> None:
            reached.set()
            assert go_on.wait(60)

        waiting.meanwhile, pruner.meanwhile = wait, finish
        waiting.calls.clear()
        pruner.calls.clear()
        waiting.at, pruner.at = p, q
        pending = training.begin()
        if p is not None:
            assert reached.wait(60)
            other.prune(KeepLatest(1))
            if not failed:  # the prune was over before
                finish()
        else:
            training.finish(pending)
            saving = len(waiting.calls)
            other.prune(KeepLatest(1))
            return saving, len(pruner.calls)
        try:
            judge(other, training.saved)
            for _ in range(2):
                with suppress(SaveFailedError):
                    training.save()
            judge(other, training.saved)
        except BaseException as error:
            error.add_note(f"save waits at {p}: {waiting.calls[p - 1]}; prune at {q}: {pruner.calls[(q or 1) - 1]}")
            raise
    return 0, int(failed[0])


def _saved(training: Training) -> bool:
    return _finished(training, training.begin())


def _finished(training: Training, pending: PendingSnapshot) -> bool:
    """Whether a save became durable; it may fail for what was pruned under it, and for nothing else."""
    try:
        training.finish(pending)
    except SaveFailedError as error:
        if getattr(error.__cause__, "kind", "") not in ("frozen_gone", "pruned_under_us", "segment_vanished"):
            raise
        return False
    return True
