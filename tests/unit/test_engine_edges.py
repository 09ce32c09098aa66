"""The engine where things go wrong around it: dropped objects, no threads, a hung disk, a damaged parent."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ciuic_async
from ciuic_async import (
    Checkpointer,
    CiuicWarning,
    KeepLatest,
    NotFoundError,
    PendingSnapshot,
    SaveFailedError,
    SnapshotChain,
    UsageError,
)
from ciuic_async.capture.state_tree import flatten
from ciuic_async.schedule.rules import Schedule
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency.log import Log

WAIT_S = 30.0


@pytest.fixture
def hung_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Publishing waits until the event is set."""
    gate = threading.Event()
    publish = LocalStore.publish

    def waiting(store: LocalStore, files: Any) -> None:
        gate.wait(WAIT_S)
        publish(store, files)

    monkeypatch.setattr(LocalStore, "publish", waiting)
    yield gate
    gate.set()


def test_history_may_be_read_while_retention_writes_it(tmp_path: Path) -> None:
    """Asking a snapshot for its parent, the moment it is durable and the writer prunes, never blocks for good."""
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, keep=KeepLatest(2)) as ckpt:
        parents = []
        for _ in range(12):
            snapshot = ckpt.save().wait_durable(WAIT_S)
            parents.append(snapshot.parent)
            assert snapshot.id in [entry["id"] for entry in ckpt.chain.log()]
            assert len(list(ckpt.chain)) >= 1
    assert parents[0] is None
    assert None not in parents[1:]


def test_a_checkpointer_that_is_dropped_finishes_what_it_took(tmp_path: Path) -> None:
    """Out of scope without close(), in a function of a script: the snapshot is there, and nothing aborts."""
    program = f"""
import os, torch
from ciuic_async import Checkpointer

def main(number):
    ckpt = Checkpointer({str(tmp_path / "chain")!r}, {{"w": torch.randn(2_000_000)}})
    ckpt.step()
    ckpt.save()

for number in range(3):
    main(number)
    links = [os.path.realpath(f"/proc/self/fd/{{name}}") for name in os.listdir("/proc/self/fd")]
    slots = [link for link in links if "ciuic-slot" in link]
    assert not slots, slots
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(SnapshotChain(tmp_path / "chain", create=False)) == 3


@pytest.mark.parametrize("left_bytes", [0, 16])
def test_a_tensor_whose_storage_was_freed_is_refused(left_bytes: int, tmp_path: Path) -> None:
    """No garbage becomes durable, and the live storage stays as it is."""
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(left_bytes)
    with pytest.raises(UsageError, match="freed or shrunk") as caught:
        ciuic_async.save({"model": {"w": tensor}}, tmp_path / "chain")
    assert caught.value.where == "model.w"
    assert tensor.untyped_storage().nbytes() == left_bytes


@pytest.mark.damages
def test_a_missing_segment_of_the_parent_costs_nothing_later(tmp_path: Path) -> None:
    """What cannot be referred to any more is written again: the next snapshots are whole."""
    state = {"frozen": torch.randn(100_000), "n": 0}
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        ckpt.save().wait_durable(WAIT_S)
        for segment in (tmp_path / "chain" / "segments").rglob("*.seg"):
            segment.unlink()
        for number in range(2):
            state["n"] = number + 1
            snapshot = ckpt.save().wait_durable(WAIT_S)
            assert torch.equal(snapshot.load()["frozen"], state["frozen"])


def test_without_threads_a_snapshot_fails_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread to be had: a failure with its reason, no slot lost, and everything works when there are threads."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(1000)}, busy_timeout_s=5.0) as ckpt:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        ckpt.step()
        for _ in range(3):
            with pytest.warns(CiuicWarning, match="no thread"):
                assert ckpt.save().phase == "failed"
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            ckpt.save().wait_durable(WAIT_S)


def test_a_skipped_snapshot_is_told_although_the_writer_hangs(tmp_path: Path, hung_disk: threading.Event) -> None:
    """Failures surface at once, whatever is still under way, and are not collected without end."""
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, busy_timeout_s=0.01) as ckpt:
        taken = [ckpt.save(), ckpt.save()]
        for _ in range(5):
            with pytest.warns(CiuicWarning, match="not durable yet"):
                assert ckpt.save().phase == "failed"
        hung_disk.set()
        assert [pending.wait_durable(WAIT_S).step for pending in taken] == [0, 0]
        stalls = [stats for stats in ckpt.stats() if not stats.snapshot]
        assert len(stalls) == 5
        assert all(stats.stall_s >= 0.01 and stats.persist_s is None for stats in stalls)


def test_time_to_durable_counts_from_staged(tmp_path: Path, hung_disk: threading.Event) -> None:
    """A snapshot that waits for the one before it was staged all that time."""
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}) as ckpt:
        first, second = ckpt.save(), ckpt.save()
        done = threading.Event()
        second.add_done_callback(lambda pending: done.set())
        assert not done.wait(0.3)
        hung_disk.set()
        first.wait_durable(WAIT_S)
        second.wait_durable(WAIT_S)
        assert all((stats.persist_s or 0) >= 0.3 for stats in ckpt.stats())


@pytest.mark.filterwarnings("ignore::ciuic_async.CiuicWarning")
def test_running_out_of_memory_after_the_claim_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the slot is claimed the snapshot is durable, whatever happens to tiles and log head."""
    publish = Log.publish_derived

    def out_of_memory(log: Log, key: Any) -> None:
        raise MemoryError

    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}) as ckpt:
        monkeypatch.setattr(Log, "publish_derived", out_of_memory)
        first = ckpt.save().wait_durable(WAIT_S)
        monkeypatch.setattr(Log, "publish_derived", publish)
        assert ckpt.save().wait_durable(WAIT_S).parent == first.id


def test_the_schedule_hears_of_a_snapshot_when_retention_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention slows training as writing does: a snapshot is on its way, and charged for, until it has ended."""
    heard: list[str] = []
    finished, prune = Schedule.finished, SnapshotChain.prune

    def noted_finished(self: Schedule, *args: Any) -> None:
        heard.append("finished" if args[3] and args[4] > 0 else "failed")
        finished(self, *args)

    def noted_prune(self: SnapshotChain, *args: Any, **options: Any) -> Any:
        result = prune(self, *args, **options)
        heard.append("tidied")
        return result

    monkeypatch.setattr(Schedule, "finished", noted_finished)
    monkeypatch.setattr(SnapshotChain, "prune", noted_prune)
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, keep=KeepLatest(1), overhead_budget=0.01) as ckpt:
        for _ in range(2):
            ckpt.save().wait_durable(WAIT_S)
    assert heard == ["tidied", "finished"] * 2


def test_retention_that_fails_is_told_once(tmp_path: Path) -> None:
    """A policy that raises harms no snapshot; training is warned of each reason once."""

    class Broken:
        def keep(self, snapshots: Any) -> set[str]:
            raise ZeroDivisionError("no such thing")

        def describe(self) -> str:
            return "Broken()"

    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, keep=Broken()) as ckpt:
        ckpt.save().wait_durable(WAIT_S)
        ckpt._writer.wait_idle()
        with pytest.warns(CiuicWarning, match="tidying up failed"):
            ckpt.step()
        ckpt.save().wait_durable(WAIT_S)
        ckpt._writer.wait_idle()
        assert ckpt.step() is None
    assert len(SnapshotChain(tmp_path / "chain")) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 3},
        {"every_steps": 0},
        {"every_steps": 0.5},
        {"every_steps": "5"},
        {"every_steps": True},
        {"every_seconds": -1},
        {"every_epochs": "one"},
        {"busy_timeout_s": "x"},
        {"busy_timeout_s": -1},
        {"host_memory_bytes": "1"},
        {"host_memory_bytes": 1},
        {"on_error": "ignore"},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """Each is a UsageError that names the argument, before a folder is made."""
    with pytest.raises(UsageError, match=next(iter(options))):
        Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, **options)
    assert not (tmp_path / "chain").exists()


def test_a_key_beside_an_open_chain_is_refused(tmp_path: Path) -> None:
    """It would be ignored: the chain has its own."""
    with SnapshotChain(tmp_path / "chain") as chain:
        with pytest.raises(UsageError, match="key="):
            Checkpointer(chain, {"w": torch.zeros(8)}, key=tmp_path / "other.key")
        with pytest.raises(UsageError, match="key="):
            ciuic_async.save({"w": 1}, chain, key=tmp_path / "other.key")


@pytest.mark.filterwarnings("ignore::ciuic_async.CiuicWarning")
def test_odd_epochs_never_raise(tmp_path: Path) -> None:
    """Whatever cannot be compared counts as changed; only the snapshot knows whether it can be stored."""
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, every_epochs=1) as ckpt:
        for epoch in (np.array([1, 2]), np.array([1, 3]), "three", (1, 2)):
            ckpt.step(epoch=epoch)
        ckpt.flush(WAIT_S)
    assert [snapshot.epoch for snapshot in SnapshotChain(tmp_path / "chain")] == ["three", None]


def test_a_callback_that_exits_does_not_end_the_writer(tmp_path: Path) -> None:
    """SystemExit in a done callback is logged like anything else."""

    def leave(pending: PendingSnapshot) -> None:
        raise SystemExit(3)

    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}) as ckpt:
        pending = ckpt.save()
        pending.add_done_callback(leave)
        pending.wait_durable(WAIT_S)
        assert ckpt.save().wait_durable(WAIT_S).parent is not None


@pytest.mark.parametrize("ref", ["step:²", "step:", "step:-1", "step:1e3", "step:" + "9" * 5000])
def test_a_step_that_is_no_number_is_not_found(ref: str, tmp_path: Path) -> None:
    """Digits only, and a bounded number of them."""
    ciuic_async.save({"w": 1}, tmp_path / "chain")
    with pytest.raises(NotFoundError):
        SnapshotChain(tmp_path / "chain").get(ref)


def test_a_bare_state_dict_is_packed_like_a_named_one() -> None:
    """5,000 small tensors at the top are a few packs, as they are one level down."""
    tensors = {f"layer.{number}.bias": torch.zeros(10) for number in range(5000)}
    bare = flatten(tensors, chunk_size_bytes=4 << 20)
    named = flatten({"model": tensors}, chunk_size_bytes=4 << 20)
    assert len(bare.plan.regions) == len(named.plan.regions) == 1


def test_waiting_for_a_failed_snapshot_tells_why(tmp_path: Path) -> None:
    """The failure carries kind and cause of what went wrong."""
    with Checkpointer(tmp_path / "chain", {"thing": object()}) as ckpt:
        with pytest.warns(CiuicWarning, match="thing"):
            pending = ckpt.save()
        with pytest.raises(SaveFailedError) as caught:
            pending.wait_durable(WAIT_S)
    assert caught.value.kind == "unsupported_type"
    assert isinstance(caught.value.__cause__, UsageError)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_close_tells_of_a_failure_nobody_has_seen(
    on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last snapshot has no later ``step`` to tell of it: ``close`` does, as ``on_error`` says."""
    ckpt = Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, on_error=on_error)

    def fail(store: LocalStore, files: Any) -> None:
        raise ciuic_async.StoreError("the disk is full", kind="enospc")

    monkeypatch.setattr(LocalStore, "publish", fail)
    ckpt.save()
    if on_error == "warn":
        with pytest.warns(CiuicWarning, match="the disk is full"):
            ckpt.close()
    else:
        with pytest.raises(SaveFailedError, match="the disk is full"):
            ckpt.close()
    ckpt.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ciuic")] == []
