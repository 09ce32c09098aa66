"""A snapshot on its way: its phases go one way, everybody who waits is told, and a failure is told once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, PendingSnapshot, SaveFailedError, StoreError


def test_phases_of_a_snapshot(tmp_path: Path) -> None:
    """It is staged when save() returns and durable later; then both waits return at once."""
    with Checkpointer(tmp_path / "chain", {"t": torch.ones(10)}) as ckpt:
        pending = ckpt.save()
        pending.wait_staged(0)
        snapshot = pending.wait_durable(30)
        assert pending.phase == "durable"
        pending.wait_staged(0)
        assert pending.wait_durable(0).id == snapshot.id
        assert pending.error is None
        assert repr(pending) == "<PendingSnapshot step=0 durable>"


def test_waiting_threads_are_woken(tmp_path: Path) -> None:
    """Any number of threads may wait for one snapshot."""
    found: list[str] = []
    with Checkpointer(tmp_path / "chain", {"t": torch.ones(10)}) as ckpt:
        pending = ckpt.save()
        threads = [threading.Thread(target=lambda: found.append(pending.wait_durable(30).id)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_an_unfinished_snapshot_times_out() -> None:
    """A wait with a limit ends with TimeoutError, which names step and phase."""
    pending = PendingSnapshot(7)
    with pytest.raises(TimeoutError, match="step 7 is still staging"):
        pending.wait_staged(0)
    pending.staged()
    pending.wait_staged(0)
    with pytest.raises(TimeoutError, match="step 7 is still staged"):
        pending.wait_durable(0)


def test_a_failure_reaches_every_wait_and_is_reported_once() -> None:
    """Both waits raise it with cause, kind and place; the loop is told only if nobody waited."""
    cause = StoreError("disk full", kind="no_space", where="/data")
    pending = PendingSnapshot(3)
    pending.failed(cause)
    failure = pending.take_unseen_error()
    assert failure is not None
    assert failure.__cause__ is cause
    assert pending.take_unseen_error() is None
    for wait in (pending.wait_staged, pending.wait_durable):
        with pytest.raises(SaveFailedError, match=r"step 3 .*disk full") as told:
            wait(0)
        assert (told.value.kind, told.value.where) == ("no_space", "/data")


def test_the_first_failure_counts() -> None:
    """What follows from a failure does not hide its cause."""
    pending = PendingSnapshot(1)
    pending.failed(StoreError("first"))
    pending.failed(StoreError("second"), seen=True)
    assert str(pending.error) == "first"
    assert pending.take_unseen_error() is not None


def test_callbacks_run_once_and_late_ones_at_once() -> None:
    """A callback added before the end runs at the end, one added after runs immediately; both get the snapshot."""
    seen: list[tuple[str, PendingSnapshot]] = []
    pending = PendingSnapshot(1)
    pending.add_done_callback(lambda p: seen.append(("early", p)))
    assert seen == []
    pending.failed(StoreError("x"))
    pending.add_done_callback(lambda p: seen.append(("late", p)))
    pending.failed(StoreError("y"))
    assert seen == [("early", pending), ("late", pending)]


def test_a_callback_may_wait_and_add_callbacks() -> None:
    """Callbacks run without the lock: they can ask the snapshot anything."""
    seen: list[str] = []
    pending = PendingSnapshot(1)

    def callback(done: PendingSnapshot) -> None:
        done.add_done_callback(lambda p: seen.append(p.phase))
        with pytest.raises(SaveFailedError):
            done.wait_durable(0)

    pending.add_done_callback(callback)
    pending.failed(StoreError("x"))
    assert seen == ["failed"]
