"""Retention: the decision is an entry in history first; then only what nobody living needs is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import IntegrityError, KeepLatest, NotFoundError, SnapshotChain, UsageError
from ciuic_async.format import layout


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
