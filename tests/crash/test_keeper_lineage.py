"""What a rescued snapshot comes from, and whose history it is added to. This process is trainer and keeper."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

from ciuic_async import Checkpointer
from ciuic_async.chain import SnapshotChain
from ciuic_async.keeper import rescue
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.keeper.rescue import Charge
from tests.crash.keeper_lives import state_of


class _Silent:
    """A keeper's client that starts nothing: the test is the keeper."""

    pid = None

    def __init__(self, *_: object) -> None:
        self.closed = threading.Event()

    def start(self) -> None: ...
    def hold(self, slot: object) -> None: ...
    def let_go(self, slot: object) -> None: ...
    def close(self) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciuic_async.checkpointer.Keeper", _Silent)


def _rescue(ckpt: Checkpointer, step: int, monkeypatch: pytest.MonkeyPatch) -> rescue.Outcome:
    """What the keeper makes of a snapshot that is staged and never reaches the writer."""
    monkeypatch.setattr(ckpt._writer, "submit", lambda job: None)
    ckpt._step = step - 1
    ckpt.step()
    slots = [HeldSlot.open(slot.descriptor) for slot in ckpt._pool._slots]
    chain = ckpt.chain
    charge = Charge(chain.url, chain.origin, chain.secret, chain.run, "auto")
    outcome = rescue.rescue(charge, rescue.newest(slot for slot in slots if slot is not None))
    for pending in ckpt._unfinished:
        pending.phase = "durable"
    return outcome


def test_checkpointers_on_one_chain_are_not_each_others_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that share a ``SnapshotChain`` share its run; what one had staged still comes from what it itself had made
    durable, and not from what the other did meanwhile."""
    with (
        SnapshotChain(tmp_path / "chain") as chain,
        Checkpointer(chain, state_of(1), every_steps=1, keeper=True, rng=False) as one,
        Checkpointer(chain, state_of(5), every_steps=1, rng=False) as other,
    ):
        for ckpt in (one, other, other):
            pending = ckpt.step()
            assert pending is not None
            pending.wait_durable(60)
        one._writer.wait_idle()
        outcome = _rescue(one, 10, monkeypatch)
        assert outcome.problem is None
        newest = chain.latest()
        assert newest is not None
        assert (newest.id, newest.step) == (outcome.snapshot, 10)
        (first, *_) = chain
        assert newest.parent == first.id


def test_an_earlier_run_is_no_sign_that_training_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts from scratch in a chain with history comes from no snapshot, like that history's first: what it
    had staged is added all the same."""
    with Checkpointer(tmp_path / "chain", state_of(1), every_steps=1, rng=False) as earlier:
        earlier.step()
    with Checkpointer(tmp_path / "chain", state_of(2), every_steps=1, keeper=True, rng=False) as ckpt:
        outcome = _rescue(ckpt, 7, monkeypatch)
        assert outcome.problem is None
        newest = ckpt.chain.latest()
        assert newest is not None
        assert (newest.id, newest.step, newest.parent) == (outcome.snapshot, 7, None)


def test_the_keeper_stays_until_all_is_durable(tmp_path: Path) -> None:
    """A checkpointer that is dropped may be collected on its writer's own thread, between two snapshots: the keeper is
    sent home when the last one is durable, not before."""
    found: list[bool] = []
    collect = threading.Event()

    def taken() -> tuple[_Silent, threading.Event]:
        ckpt = Checkpointer(tmp_path / "chain", state_of(1), keeper=True, rng=False)
        ckpt.cycle = ckpt  # type: ignore[attr-defined]  # only garbage collection ends it
        keeper = ckpt._keeper
        assert isinstance(keeper, _Silent)
        ended = ckpt._writer._ended

        def first_is_durable(_: object) -> None:
            assert collect.wait(60)
            gc.collect()
            found.append(keeper.closed.is_set())

        ckpt.save().add_done_callback(first_is_durable)
        ckpt.save().add_done_callback(lambda pending: found.append(keeper.closed.is_set()))
        return keeper, ended

    gc.disable()
    try:
        keeper, ended = taken()
        collect.set()
        assert ended.wait(60)
        assert keeper.closed.wait(60)
    finally:
        gc.enable()
    assert found == [False, False]
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        assert len(chain) == 2


def test_a_rollback_is_not_undone_by_a_late_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody rolls the chain back after the trainer died: what it had staged is not added, and the target stays the
    latest. A rollback that the trainer itself went on from is no hindrance."""
    with (
        SnapshotChain(tmp_path / "chain") as chain,
        Checkpointer(chain, state_of(1), every_steps=1, keeper=True, rng=False) as ckpt,
    ):
        for _ in range(2):
            pending = ckpt.step()
            assert pending is not None
            pending.wait_durable(60)
        chain.rollback("step:1", "before")
        pending = ckpt.step()  # training knows nothing of it, and its next snapshot is the latest
        assert pending is not None
        pending.wait_durable(60)
        ckpt._writer.wait_idle()
        assert _rescue(ckpt, 10, monkeypatch).problem is None
        chain.rollback("step:2", "after")
        outcome = _rescue(ckpt, 20, monkeypatch)
        assert "rolled back" in str(outcome.problem)
        latest = chain.latest()
        assert latest is not None
        assert latest.step == 2
