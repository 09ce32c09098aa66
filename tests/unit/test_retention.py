"""Retention: the decision is an entry in history first; then only what nobody living needs is deleted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ciuic_async
from ciuic_async import (
    Checkpointer,
    IntegrityError,
    KeepBest,
    KeepBytes,
    KeepEvery,
    KeepLatest,
    KeepTagged,
    NotFoundError,
    SaveFailedError,
    SnapshotChain,
    UsageError,
)
from ciuic_async import chain as chain_module
from ciuic_async.format import layout
from ciuic_async.format.entry import PruneEntry
from ciuic_async.retention.policy import Policy
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _filled(folder: Path, count: int = 4) -> SnapshotChain:
    """A chain whose snapshots share a big tensor that only the first one wrote."""
    chain = SnapshotChain(folder)
    shared = torch.randn(100_000)
    for number in range(count):
        ciuic_async.save({"shared": shared, "own": torch.full((50_000,), float(number))}, chain)
    return chain


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", True])
def test_keeping_nothing_is_refused(count: Any) -> None:
    """A policy that leaves nothing to resume from is a UsageError."""
    with pytest.raises(UsageError, match="at least 1"):
        KeepLatest(count)


def test_pruned_snapshots_go_and_living_ones_stay_whole(tmp_path: Path) -> None:
    """Segments of a pruned snapshot stay while a living one refers to them; the rest of its files go."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    report = chain.prune(KeepLatest(2))
    assert report.pruned == tuple(ids[:2])
    assert report.kept == tuple(ids[2:])
    assert report.freed_bytes > 0
    files = _files(tmp_path / "chain")
    assert layout.segment(ids[0], 0, 0) in files, "it holds the shared tensor"
    assert not [
        name for name in files if name.startswith((f"manifests/{ids[0]}", f"segments/{ids[1]}", f"locators/{ids[0]}"))
    ]
    assert [float(snapshot.load()["own"][0]) for snapshot in chain] == [2.0, 3.0]
    assert chain.verify().ok
    with pytest.raises(NotFoundError):
        chain.get(ids[0])


def test_a_dry_run_says_what_would_go(tmp_path: Path) -> None:
    """Same figures as the real run, nothing changed."""
    chain = _filled(tmp_path / "chain")
    before = _files(tmp_path / "chain")
    plan = chain.prune(KeepLatest(1), dry_run=True)
    assert _files(tmp_path / "chain") == before
    assert len(chain) == 4
    assert chain.prune(KeepLatest(1)) == plan


def test_nothing_to_prune_leaves_no_entry(tmp_path: Path) -> None:
    """A policy that keeps everything writes nothing."""
    chain = _filled(tmp_path / "chain", 2)
    entries = chain.log()
    assert chain.prune(KeepLatest(5)).pruned == ()
    assert chain.log() == entries


def test_pruning_again_after_saving_frees_the_rest(tmp_path: Path) -> None:
    """When no living snapshot needs an old segment any more, it goes with the next prune."""
    chain = _filled(tmp_path / "chain")
    first = next(iter(chain)).id
    chain.prune(KeepLatest(1))
    assert layout.segment(first, 0, 0) in _files(tmp_path / "chain")
    ciuic_async.save({"other": torch.ones(3)}, chain)
    chain.prune(KeepLatest(1))
    assert layout.segment(first, 0, 0) not in _files(tmp_path / "chain")
    assert chain.verify().ok


@pytest.mark.damages
def test_with_a_damaged_living_snapshot_nothing_is_deleted(tmp_path: Path) -> None:
    """Nobody knows what it needs: an IntegrityError says so, and every segment is still there."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    (tmp_path / "chain" / layout.locator(ids[3], 0)).unlink()
    segments = {name for name in _files(tmp_path / "chain") if name.startswith("segments")}
    with pytest.raises(IntegrityError, match="nothing was deleted"):
        chain.prune(KeepLatest(2))
    assert {name for name in _files(tmp_path / "chain") if name.startswith("segments")} == segments


def test_gc_spares_young_orphans_and_sweeps_old_ones(tmp_path: Path) -> None:
    """Files that no entry claims go once they are old enough by the store's clock."""
    chain = _filled(tmp_path / "chain", 1)
    orphan = tmp_path / "chain" / layout.segment(layout.new_id(), 0, 0)
    orphan.parent.mkdir()
    orphan.write_bytes(b"left by a crash")
    before = _files(tmp_path / "chain")
    assert chain.gc().deleted_files == 0
    assert _files(tmp_path / "chain") == before
    assert chain.gc(orphan_age_s=0).deleted_files == 1
    assert not orphan.exists()
    assert chain.verify().ok
    latest = chain.latest()
    assert latest is not None
    assert float(latest.load()["own"][0]) == 0


def test_a_checkpointer_survives_pruning_by_another_writer(tmp_path: Path) -> None:
    """Chunks of the parent that a prune took away are written again: the next snapshot is whole."""
    state: dict[str, Any] = {"shared": torch.randn(100_000), "n": 0}
    with ciuic_async.Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        ckpt.save().wait_durable(30)
        with SnapshotChain(tmp_path / "chain") as other:
            ciuic_async.save({"unrelated": 1}, other)
            other.prune(KeepLatest(1))
        state["n"] = 1
        snapshot = ckpt.save().wait_durable(30)
        assert torch.equal(snapshot.load()["shared"], state["shared"])
    chain = SnapshotChain(tmp_path / "chain")
    assert chain.verify().ok
    assert len(chain) == 2


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for part in ("segments", "manifests") for path in (folder / part).rglob("*.*"))


def test_what_is_said_to_be_freed_is_what_the_disk_gets_back(tmp_path: Path) -> None:
    """Segments and manifests by the byte, locators too; and for every snapshot the files that it wrote."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    locators = sum((tmp_path / "chain" / layout.locator(one, 0)).stat().st_size for one in ids[:2])
    before = _size_bytes(tmp_path / "chain")
    report = chain.prune(KeepLatest(2), rebase=False)
    assert report.freed_bytes == before - _size_bytes(tmp_path / "chain") + locators
    assert sum(report.freed_by.values()) == report.freed_bytes
    assert set(report.freed_by) == set(report.pruned) == set(ids[:2])
    assert report.reasons == {ids[2]: ("latest=2",), ids[3]: ("latest=2", "it is the latest")}


def test_abandoned_snapshots_go_first(tmp_path: Path) -> None:
    """After a rollback the newest are those of the line; the one rolled back to stays though it is old."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    chain.rollback(ids[1])
    report = chain.prune(KeepLatest(1))
    assert report.kept == (ids[1],)
    assert report.pruned == (ids[2], ids[3], ids[0])
    latest = chain.latest()
    assert latest is not None
    assert float(latest.load()["own"][0]) == 1.0


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    """What snapshots share counts once: the tensor that the first one wrote for all of them."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    first, each = 620_000, 215_000  # the shared tensor lies in the first one's segment
    assert chain.prune(KeepBytes(first + 3 * each), dry_run=True).kept == tuple(ids)
    assert chain.prune(KeepBytes(first + 2 * each), dry_run=True).kept == tuple(ids[2:])
    assert chain.prune(KeepBytes(first + 2 * each) | KeepEvery(5), dry_run=True).kept == tuple(ids[2:])
    assert chain.prune(KeepBytes(first), dry_run=True).kept == (ids[3],)


@pytest.mark.damages
def test_a_damaged_snapshot_has_a_size_and_can_go(tmp_path: Path) -> None:
    """It is not read to decide, and the rest is freed once it is pruned itself."""
    chain = _filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    (tmp_path / "chain" / layout.locator(ids[1], 0)).unlink()
    report = chain.prune(KeepBytes(1_100_000))
    assert report.pruned == (ids[0], ids[1])
    assert chain.verify().ok


def test_training_prunes_by_any_policy(tmp_path: Path) -> None:
    """``Checkpointer(keep=...)`` takes unions; a snapshot that is best stays until a better one comes."""
    losses = [3.0, 1.0, 2.0, 2.5, 0.5, 4.0]
    keep: Policy = KeepLatest(2) | KeepBest("loss") | KeepTagged("gold")
    state: dict[str, Any] = {"w": torch.randn(100_000), "n": 0}
    with Checkpointer(tmp_path / "chain", state, keep=keep, rng=False) as ckpt:
        for step, loss in enumerate(losses):
            state["n"] = step
            ckpt.save(metrics={"loss": loss}, tags=["gold"] if step == 0 else []).wait_durable(30)
            if step == 3:
                ckpt.flush()
                with SnapshotChain(tmp_path / "chain") as chain:
                    assert [one.load()["n"] for one in chain] == [0, 1, 2, 3]
    with SnapshotChain(tmp_path / "chain") as chain:
        assert [one.load()["n"] for one in chain] == [0, 4, 5]
        said = {entry.policy for _, entry in chain.target().log.entries() if isinstance(entry, PruneEntry)}
        assert said == {keep.describe()}


# --- crashed writers, and writers at work -----------------------------------------------------------------------------


def test_gc_spares_a_writer_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its unpublished files are locked, its published ones young: a gc right before the claim takes neither."""
    with SnapshotChain(tmp_path / "chain") as other:
        swept = _meanwhile(monkeypatch, lambda: other.gc().deleted_files)
        ciuic_async.save({"w": torch.randn(100_000)}, tmp_path / "chain")
        assert swept == [0]


def test_a_writer_slower_than_the_age_of_orphans_fails_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it published looks like an orphan by then, and goes: it notices before its claim, and the next one works."""
    state: dict[str, Any] = {"w": torch.randn(100_000)}
    with SnapshotChain(tmp_path / "chain") as other, Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        swept = _meanwhile(monkeypatch, lambda: other.gc(orphan_age_s=0).deleted_files)
        with pytest.raises(SaveFailedError) as caught:
            ckpt.save().wait_durable(30)
        assert getattr(caught.value.__cause__, "kind", "") == "segment_vanished"
        assert swept == [1]
        assert len(other) == 0
        assert torch.equal(ckpt.save().wait_durable(30).load()["w"], state["w"])


def _meanwhile(monkeypatch: pytest.MonkeyPatch, action: Any) -> list[Any]:
    """Call ``action`` once, when segments are published and the manifest is about to be; what it returned."""
    publish = LocalStore.publish
    returned: list[Any] = []

    def paused(store: LocalStore, files: Sequence[Unpublished]) -> None:
        if not returned and any(file.name.endswith("root.json") for file in files):
            returned.append(action())
        publish(store, files)

    monkeypatch.setattr(LocalStore, "publish", paused)
    return returned


def test_age_is_by_the_stores_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock runs a year ahead sweeps nothing early; only the store's times count."""
    chain = _filled(tmp_path / "chain", 1)
    orphan = tmp_path / "chain" / layout.segment(layout.new_id(), 0, 0)
    orphan.parent.mkdir()
    orphan.write_bytes(b"left by a crash")
    ahead = time.time() + 365 * 86400
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert chain.gc().deleted_files == 0
    old = orphan.stat().st_mtime - 25 * 3600
    os.utime(orphan, (old, old))
    plan = chain.gc(dry_run=True)
    assert orphan.exists()
    assert (plan.deleted_files, plan.freed_bytes) == (1, 15)
    assert chain.gc() == plan
    assert not orphan.exists()


# --- anything, in any order -------------------------------------------------------------------------------------------

policies: st.SearchStrategy[Policy] = st.sampled_from(
    [
        KeepLatest(1),
        KeepLatest(2),
        KeepBest("loss"),
        KeepTagged(),
        KeepBytes(500_000),
        KeepLatest(1) | KeepBest("loss", largest=True),
        KeepTagged("a") | KeepBytes(300_000),
    ]
)
actions = st.one_of(
    st.tuples(st.just("save"), st.tuples(*[st.integers(0, 2)] * 3)),
    st.tuples(st.just("save"), st.tuples(*[st.integers(0, 2)] * 3)),
    st.tuples(st.just("prune"), policies, st.booleans()),
    st.tuples(st.just("rollback"), st.integers(0, 9)),
    st.tuples(st.just("tag"), st.sampled_from("ab"), st.integers(0, 9)),
    st.tuples(st.just("gc")),
)


def _content(choice: tuple[int, ...]) -> dict[str, torch.Tensor]:
    sizes = (17_000, 20_000, 50_000)
    return {
        f"t{number}": torch.randn(size, generator=torch.Generator().manual_seed(10 * number + variant))
        for number, (size, variant) in enumerate(zip(sizes, choice, strict=True))
    }


@settings(max_examples=40)
@given(todo=st.lists(actions, min_size=3, max_size=14))
def test_whatever_is_pruned_all_that_is_kept_stays_whole(todo: list[tuple[Any, ...]]) -> None:
    """Saves that share tensors, rollbacks, tags and prunes in any order: a dry run foretells the real one to the byte,
    what it keeps is there, reads back bit for bit and verifies."""
    with pytest.MonkeyPatch.context() as patch:
        store = MemoryStore()
        patch.setattr(chain_module, "resolve_store", lambda url, _options: store)
        chain = SnapshotChain("memory")
        saved: dict[str, tuple[int, ...]] = {}
        for what, *arguments in todo:
            living = [snapshot.id for snapshot in chain]
            if what == "save":
                (choice,) = arguments
                saved[ciuic_async.save(_content(choice), chain, metrics={"loss": float(sum(choice))}).id] = choice
            elif what == "gc":
                chain.gc()
            elif not living:
                continue
            elif what == "prune":
                policy, rebase = arguments
                plan = chain.prune(policy, dry_run=True, rebase=rebase)
                assert chain.prune(policy, rebase=rebase) == plan
                assert {*plan.kept, *plan.pruned} == set(living)
                assert [snapshot.id for snapshot in chain] == [one for one in living if one in plan.kept]
            elif what == "rollback":
                chain.rollback(living[arguments[0] % len(living)])
            else:
                chain.tag(arguments[0], living[arguments[1] % len(living)])
        for snapshot in chain:
            loaded = snapshot.load()
            assert all(torch.equal(loaded[name], value) for name, value in _content(saved[snapshot.id]).items())
        assert chain.verify().problems == ()
