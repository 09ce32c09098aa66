"""Re-basing: what is still needed of a segment that is mostly garbage moves, and every snapshot reads back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, SnapshotChain, StoreError, verify
from ciuic_async.format import layout
from ciuic_async.pipeline import placement
from ciuic_async.retention import collect, rebase
from ciuic_async.retention.policy import KeepTagged
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore


def shared() -> torch.Tensor:
    """What every snapshot of these tests has, and only the first one wrote."""
    return torch.randn(50_000, generator=torch.Generator().manual_seed(1))


def state_of(number: int) -> dict[str, torch.Tensor]:
    own = torch.randn(300_000, generator=torch.Generator().manual_seed(1000 + number))
    return {"shared": shared(), "own": own}


def filled(folder: Path, count: int = 4) -> SnapshotChain:
    """Snapshots that share a sixth of the first one's segment."""
    chain = SnapshotChain(folder)
    for number in range(count):
        ciuic_async.save(state_of(number), chain)
    return chain


def segments(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "segments").rglob("*.seg")}


def check_all(chain: SnapshotChain, states: dict[str, dict[str, torch.Tensor]]) -> None:
    """These snapshots are there, read back bit for bit, and the chain verifies."""
    assert {snapshot.id for snapshot in chain} == set(states)
    for snapshot in chain:
        loaded = snapshot.load()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in states[snapshot.id].items())
    assert chain.verify().problems == ()


def meanwhile(monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, action: Callable[[], None]) -> None:
    """Call ``action`` once, right before ``publish`` of a file whose name starts and ends so."""
    publish = LocalStore.publish
    done = threading.Event()

    def paused(store: LocalStore, files: Sequence[Unpublished]) -> None:
        hit = any(file.name.startswith(name) and file.name.endswith(suffix) for file in files)
        if hit and not done.is_set():
            done.set()
            action()
        publish(store, files)

    monkeypatch.setattr(LocalStore, "publish", paused)


# --- the move ---------------------------------------------------------------------------------------------------------


def test_a_segment_that_is_mostly_garbage_goes(tmp_path: Path) -> None:
    """The shared tensor moves to the latest's own segments, all kept ones follow, and the old segment is deleted."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    report = chain.prune(KeepLatest(2))
    assert report.moved_bytes >= 200_000
    left = segments(tmp_path / "chain")
    assert {layout.owner(name) for name in left} == set(ids[2:])
    for snapshot in chain:
        places = {place.segment.path for place in snapshot.resolve().locator.chunks.values()}
        assert [p for p in places if layout.owner(p) == ids[3] and p != layout.segment(ids[3], 0, 0)]
        assert places <= left
    check_all(chain, {ids[2]: state_of(2), ids[3]: state_of(3)})
    assert report.freed_by[ids[0]] > 1_400_000


def test_two_nodes_that_prune_at_once_write_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two re-base at the same moment lies under names of their own: on some stores one would replace the other."""
    chain = filled(tmp_path / "chain")
    twin = tmp_path / "twin"
    shutil.copytree(tmp_path / "chain", twin)
    before = segments(tmp_path / "chain")
    assert chain.prune(KeepLatest(2)).moved_bytes > 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another node's"))
    with SnapshotChain(twin) as other:
        other.prune(KeepLatest(2))
    mine, theirs = segments(tmp_path / "chain") - before, segments(twin) - before
    assert len(mine) == len(theirs) == 1
    assert mine.isdisjoint(theirs)


def test_without_rebase_the_segment_stays(tmp_path: Path) -> None:
    """``rebase=False`` moves nothing; a later prune that may, frees it, and says so in the log though nothing goes."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    assert chain.prune(KeepLatest(2), rebase=False).moved_bytes == 0
    assert layout.segment(ids[0], 0, 0) in segments(tmp_path / "chain")
    plan = chain.prune(KeepLatest(2), dry_run=True)
    report = chain.prune(KeepLatest(2))
    assert report == plan
    assert (report.pruned, set(report.freed_by)) == ((), {ids[0]})
    assert layout.segment(ids[0], 0, 0) not in segments(tmp_path / "chain")
    assert [fact["kind"] for fact in chain.log()][-2:] == ["prune", "note"]
    before = chain.log()
    assert chain.prune(KeepLatest(2)).freed_bytes == 0
    assert chain.log() == before
    check_all(chain, {ids[2]: state_of(2), ids[3]: state_of(3)})


def test_a_segment_that_is_mostly_needed_stays(tmp_path: Path) -> None:
    """Copying would write more than it frees."""
    chain = SnapshotChain(tmp_path / "chain")
    big = torch.randn(300_000)
    first = ciuic_async.save({"big": big, "own": torch.zeros(30_000)}, chain)
    ciuic_async.save({"big": big, "own": torch.ones(30_000)}, chain)
    report = chain.prune(KeepLatest(1))
    assert report.moved_bytes == 0
    assert layout.segment(first.id, 0, 0) in segments(tmp_path / "chain")


def test_tiny_segments_are_not_worth_a_move(tmp_path: Path) -> None:
    """A copy in a segment of the smallest size, and new locators, cost more than they free."""
    chain = SnapshotChain(tmp_path / "chain")
    for number in range(3):
        ciuic_async.save({"a": torch.arange(20_000, dtype=torch.uint8), "n": torch.full((2,), number)}, chain)
    assert chain.prune(KeepLatest(1)).moved_bytes == 0
    assert chain.verify().ok


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_delta_chains_stay_readable(tmp_path: Path, kept: int) -> None:
    """Deltas and the bases they need move as they are, at their depths, whichever snapshots stay."""
    weights = torch.randn(300_000, generator=torch.Generator().manual_seed(5))
    states: dict[str, dict[str, torch.Tensor]] = {}
    folder = tmp_path / "chain"
    state = {"w": weights, "noise": torch.zeros(0)}
    with Checkpointer(folder, state, rng=False, codec="smallest") as ckpt:
        for step in range(1, 10):
            weights.mul_(1 + 1e-6 * step)
            # So that the segment of a base is mostly garbage once the base's snapshot is gone.
            noise = torch.randn(600_000, generator=torch.Generator().manual_seed(step))
            state["noise"] = noise
            snapshot = ckpt.save().wait_durable(30)
            states[snapshot.id] = {"w": weights.clone(), "noise": noise.clone()}
    with SnapshotChain(folder) as chain:
        plan = chain.prune(KeepLatest(kept), dry_run=True)
        assert chain.prune(KeepLatest(kept)) == plan
        assert plan.moved_bytes > 0
        ids = list(states)[-kept:]
        check_all(chain, {one: states[one] for one in ids})
        assert {layout.owner(name) for name in segments(folder)} == set(ids)
        assert any(place.depth for one in chain for place in one.resolve().locator.chunks.values())


def test_moved_segments_move_again(tmp_path: Path) -> None:
    """Pruning after every save, for a while: what is shared is never lost, and the size stays bounded."""
    chain = filled(tmp_path / "chain", 1)
    for number in range(1, 7):
        ciuic_async.save(state_of(number), chain)
        chain.prune(KeepLatest(1))
        latest = chain.latest()
        assert latest is not None
        check_all(chain, {latest.id: state_of(number)})
        assert sum((tmp_path / "chain" / name).stat().st_size for name in segments(tmp_path / "chain")) < 3_000_000


def test_tagged_snapshots_in_the_middle_follow(tmp_path: Path) -> None:
    """What is kept need not be the newest: every snapshot that refers to the segment gets its own new locator."""
    chain = filled(tmp_path / "chain", 6)
    ids = [snapshot.id for snapshot in chain]
    for number in (1, 3):
        chain.tag(f"v{number}", ids[number])
    chain.prune(KeepTagged("v*") | KeepLatest(1))
    check_all(chain, {ids[1]: state_of(1), ids[3]: state_of(3), ids[5]: state_of(5)})
    assert layout.segment(ids[0], 0, 0) not in segments(tmp_path / "chain")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.damages
def test_a_damaged_record_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What does not match its digest stays where it is, for verify to find; the prune itself works."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    path = tmp_path / "chain" / layout.segment(ids[0], 0, 0)
    place = next(p for p in chain.get(ids[3]).resolve().locator.chunks.values() if ids[0] in p.segment.path)
    data = bytearray(path.read_bytes())
    data[place.offset_bytes + place.record_size_bytes - 1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    report = chain.prune(KeepLatest(2))
    assert report.moved_bytes == 0
    assert path.exists()
    assert "stays where it is" in caplog.text
    assert {problem.kind for problem in chain.verify().problems} <= {"digest_mismatch", "bad_payload"}
    assert not chain.verify().ok


def test_a_move_that_fails_is_no_failed_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk pruning frees what it can without copying; the next one moves the rest."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]

    def full(*_: object) -> int:
        raise StoreError("no space left", kind="enospc")

    with monkeypatch.context() as patch:
        patch.setattr(rebase, "carry_out", full)
        report = chain.prune(KeepLatest(2))
    assert report.pruned == tuple(ids[:2])
    assert layout.segment(ids[1], 0, 0) not in segments(tmp_path / "chain")
    assert layout.segment(ids[0], 0, 0) in segments(tmp_path / "chain")
    assert "mostly garbage stay for now" in caplog.text
    assert chain.prune(KeepLatest(2)).moved_bytes > 0
    check_all(chain, {ids[2]: state_of(2), ids[3]: state_of(3)})


def test_two_that_prune_at_once_harm_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to publish a locator finds the first one's there, withdraws its own copies, and prunes on."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    other = SnapshotChain(tmp_path / "chain")
    meanwhile(monkeypatch, f"locators/{ids[3]}", ".1.json", lambda: assert_moved(other))
    report = chain.prune(KeepLatest(2))
    assert report.pruned == ()
    check_all(chain, {ids[2]: state_of(2), ids[3]: state_of(3)})
    used = {p.segment.path for one in chain for p in one.resolve().locator.chunks.values()}
    assert segments(tmp_path / "chain") == used


def assert_moved(chain: SnapshotChain) -> None:
    assert chain.prune(KeepLatest(2)).moved_bytes > 0


# --- writers and readers at work --------------------------------------------------------------------------------------


def test_a_training_that_goes_on_finds_what_was_moved(tmp_path: Path) -> None:
    """Another process prunes and moves: the next snapshot refers to the new places and stores nothing anew."""
    frozen, head = shared(), torch.zeros(300_000)
    with Checkpointer(tmp_path / "chain", {"f": frozen, "h": head}, frozen=["f"], rng=False, codec="raw") as ckpt:
        for _ in range(3):
            head.add_(1)
            ckpt.save().wait_durable(30)
        with SnapshotChain(tmp_path / "chain") as other:
            assert other.prune(KeepLatest(1)).moved_bytes > 0
        head.add_(1)
        snapshot = ckpt.save().wait_durable(30)
        assert snapshot.stored_bytes < 1_300_000
        loaded = snapshot.load()
        assert torch.equal(loaded["f"], frozen)
        assert torch.equal(loaded["h"], head)


@pytest.mark.parametrize("codec", ["raw", "smallest"])
@pytest.mark.parametrize("goes", ["moved", "pruned"])
def test_a_prune_before_the_claim_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: str, codec: str
) -> None:
    """A snapshot is written and not claimed when a prune takes its parent, or moves what it leans on: it reads back."""
    weights, own = shared(), torch.zeros(300_000)
    reports: list[collect.PruneReport] = []
    with Checkpointer(tmp_path / "chain", {"w": weights, "o": own}, rng=False, codec=codec) as ckpt:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            if codec == "smallest":
                weights.mul_(1 + 1e-6)
            own.copy_(torch.randn(300_000, generator=torch.Generator().manual_seed(step)))
            ckpt.save().wait_durable(30)
        own.copy_(torch.randn(300_000, generator=torch.Generator().manual_seed(4)))

        def prune() -> None:
            with SnapshotChain(tmp_path / "chain") as other:
                if goes == "pruned":
                    ciuic_async.save({"unrelated": 1}, other)
                reports.append(other.prune(KeepLatest(1)))

        meanwhile(monkeypatch, "manifests", "root.json", prune)
        snapshot = ckpt.save().wait_durable(30)
        assert (reports[0].moved_bytes > 0) == (goes == "moved")
        assert snapshot.resolve().locator.generation == 1
        loaded = snapshot.load()
        assert torch.equal(loaded["w"], weights)
        assert torch.equal(loaded["o"], own)
        weights.mul_(1 + 1e-6)
        following = ckpt.save().wait_durable(30)
        assert torch.equal(following.load()["w"], weights)
    with SnapshotChain(tmp_path / "chain") as chain:
        assert chain.verify().ok


def test_places_that_were_given_up_stay_until_an_entry_is_claimed(tmp_path: Path) -> None:
    """A writer may lean on them: gc leaves them for a day, however often it runs; the next prune may take them."""
    chain = filled(tmp_path / "chain")
    ids = [snapshot.id for snapshot in chain]
    chain.prune(KeepLatest(2), rebase=False)
    target = chain.target()
    living = [snapshot.entry for snapshot in chain]
    rebase.carry_out(target.store, rebase.plan(target.store, living))  # and the pruner dies
    old = layout.segment(ids[0], 0, 0)
    assert chain.gc().deleted_files == 0
    assert old in segments(tmp_path / "chain")
    assert chain.gc(dry_run=True, orphan_age_s=0).freed_by.keys() == {ids[0]}
    report = chain.prune(KeepLatest(2))
    assert old not in segments(tmp_path / "chain")
    assert report.freed_by.keys() == {ids[0]}
    check_all(chain, {ids[2]: state_of(2), ids[3]: state_of(3)})


def test_copies_of_a_pruner_that_died_are_swept(tmp_path: Path) -> None:
    """Segments of a living snapshot that no locator names go with gc, once they are old; its own ones never do."""
    chain = filled(tmp_path / "chain", 2)
    ids = [snapshot.id for snapshot in chain]
    stray = tmp_path / "chain" / layout.segment(ids[1], 0, 1)
    stray.write_bytes(b"copied, and no locator published")
    assert chain.gc().deleted_files == 0
    assert chain.gc(orphan_age_s=0).deleted_files == 1
    assert not stray.exists()
    check_all(chain, {ids[0]: state_of(0), ids[1]: state_of(1)})


def test_a_reader_follows_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that stays is loaded while what it needs is moved and the old place deleted: it reads back."""
    chain = filled(tmp_path / "chain")
    latest = chain.latest()
    assert latest is not None
    plan_reads = placement.plan_reads
    other = SnapshotChain(tmp_path / "chain")
    pruned: list[collect.PruneReport] = []

    def pruning(*args: Any) -> Any:
        if not pruned:
            pruned.append(other.prune(KeepLatest(1)))
        return plan_reads(*args)

    monkeypatch.setattr(placement, "plan_reads", pruning)
    loaded = latest.load()
    assert pruned[0].moved_bytes > 0
    assert torch.equal(loaded["shared"], shared())
    assert torch.equal(loaded["own"], state_of(3)["own"])


@pytest.mark.parametrize("deep", [False, True])
def test_verify_follows_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    """Places that were given up while verify looked are no problem, and the new ones are checked."""
    chain = filled(tmp_path / "chain")
    other = SnapshotChain(tmp_path / "chain")
    generations = verify.locator_generations
    pruned: list[collect.PruneReport] = []

    def pruning(store: Any, snapshot: str) -> list[int]:
        found = generations(store, snapshot)
        if not pruned and snapshot == other.log()[-1]["id"]:
            pruned.append(other.prune(KeepLatest(1)))
        return found

    monkeypatch.setattr(verify, "locator_generations", pruning)
    report = chain.verify(deep=deep)
    assert pruned[0].moved_bytes > 0
    assert report.problems == ()
