"""verify of a chain that changes while it is walked: what a signed prune took is no damage, all else is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.events import Event, Listener
from ciuic_async.format import layout, merkle
from ciuic_async.format.entry import PruneEntry, RollbackEntry, TagEntry
from ciuic_async.stores.local import LocalStore
from ciuic_async.verify import VerifyReport, verify_store


def _chain(path: Path, frozen: torch.Tensor | None = None) -> list[str]:
    """Four snapshots of a changing tensor; a frozen one lies in the first snapshot's segment."""
    weight = torch.zeros(5000)
    state = {"w": weight} if frozen is None else {"w": weight, "frozen": frozen}
    ids = []
    with Checkpointer(path, state, codec="raw", rng=False) as ckpt:
        for value in range(4):
            weight.fill_(value + 1)
            ids.append(ckpt.save().wait_durable(30).id)
    return ids


def _verify(path: Path, *, deep: bool = True, listener: Listener | None = None) -> VerifyReport:
    with closing(LocalStore(path)) as store:
        return verify_store(store, deep=deep, listener=listener)


class PruneOnce:
    """A listener by which another process prunes while verify is between its first and second snapshot."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done = False

    def __call__(self, event: Event) -> None:
        if not self.done:
            self.done = True
            with SnapshotChain(self._path) as chain:
                chain.prune(KeepLatest(1))


@pytest.mark.parametrize("deep", [True, False])
def test_a_prune_in_the_middle_is_no_damage(deep: bool, tmp_path: Path) -> None:
    """Snapshots that a prune entry names after the audit are not reported as missing, only noted."""
    path = tmp_path / "chain"
    _chain(path)
    prune = PruneOnce(path)
    report = _verify(path, deep=deep, listener=prune)
    assert prune.done
    assert report.problems == ()
    assert report.ok
    assert report.snapshots == 2, "the one before the prune and the one that stayed"
    assert any("2 snapshots were pruned" in text for text in report.notes)


@pytest.mark.damages
def test_a_prune_in_the_middle_excuses_no_other_snapshot(tmp_path: Path) -> None:
    """What is missing of a snapshot that no prune names stays a problem."""
    path = tmp_path / "chain"
    ids = _chain(path)
    (path / layout.segment(ids[3], 0, 0)).unlink()
    report = _verify(path, listener=PruneOnce(path))
    assert {(problem.kind, problem.snapshot) for problem in report.problems} == {("missing", ids[3])}


@pytest.mark.damages
def test_damage_of_a_shared_segment_outlives_the_pruned_snapshot(tmp_path: Path) -> None:
    """A segment found damaged for a snapshot that was then pruned is still a problem of the one that needs it."""
    path = tmp_path / "chain"
    ids = _chain(path, torch.arange(100_000.0))
    segment = path / layout.segment(ids[0], 0, 0)
    segment.chmod(0o644)
    data = bytearray(segment.read_bytes())
    at = data.index(torch.ones(8).numpy().tobytes())  # of the first snapshot's own tensor: no chunk of the last one
    data[at + 1000] ^= 1
    segment.write_bytes(data)
    report = _verify(path, listener=PruneOnce(path))
    assert {problem.snapshot for problem in report.problems} == {ids[3]}
    assert {problem.where for problem in report.problems} == {layout.segment(ids[0], 0, 0)}


@pytest.mark.damages
def test_missing_files_without_a_prune_are_problems(tmp_path: Path) -> None:
    """The second look at the log excuses nothing when it says nothing new."""
    path = tmp_path / "chain"
    ids = _chain(path)
    (path / layout.manifest_root(ids[1])).unlink()
    report = _verify(path)
    assert [(problem.kind, problem.snapshot) for problem in report.problems] == [("missing", ids[1])]
    assert report.snapshots == 4


# --- rules between entries --------------------------------------------------------------------------------------------


def _add(path: Path, *entries: Callable[[SnapshotChain], bytes]) -> None:
    """Append what no writer of this package would: the log takes any entry that a key signs."""
    with SnapshotChain(path) as chain:
        chain.target().append(lambda _: [entry(chain) for entry in entries])


def _leaf(path: Path, snapshot: str) -> bytes:
    with SnapshotChain(path) as chain:
        return chain.get(snapshot).leaf_hash


@pytest.mark.damages
def test_a_rollback_to_what_is_not_there_is_bad_history(tmp_path: Path) -> None:
    """Its target must be a snapshot before it that lives: no other entry, nothing unknown, none that was pruned."""
    path = tmp_path / "chain"
    ids = _chain(path)
    leaf = _leaf(path, ids[0])
    _add(path, lambda chain: RollbackEntry(chain.common(), leaf, "good").encode())
    assert _verify(path).ok
    with SnapshotChain(path) as chain:
        of_key = merkle.leaf_hash(chain.entry_bytes(0))
    _add(path, lambda chain: RollbackEntry(chain.common(), of_key, "a key").encode())
    _add(path, lambda chain: RollbackEntry(chain.common(), b"\7" * 32, "nothing").encode())
    _add(path, lambda chain: PruneEntry(chain.common(), (ids[0],), "test").encode())
    _add(path, lambda chain: RollbackEntry(chain.common(), leaf, "pruned").encode())
    report = _verify(path)
    assert [(problem.kind, problem.where) for problem in report.problems] == [
        ("bad_history", "entry 6"),
        ("bad_history", "entry 7"),
        ("bad_history", "entry 9"),
    ]
    assert {level.name: level.state for level in report.levels}["entries"] == "failed"
    assert report.level == "tiles (integrity only)"


@pytest.mark.damages
def test_a_tag_of_what_is_not_there_is_bad_history(tmp_path: Path) -> None:
    """A tag's snapshot is before it; taking a name away, and tags of what is pruned later, are history as usual."""
    path = tmp_path / "chain"
    ids = _chain(path)
    _add(path, lambda chain: TagEntry(chain.common(), "a", ids[0]).encode())
    _add(path, lambda chain: TagEntry(chain.common(), "b", None).encode())
    _add(path, lambda chain: PruneEntry(chain.common(), (ids[0],), "test").encode())
    assert _verify(path).ok
    _add(path, lambda chain: TagEntry(chain.common(), "c", "0" * 20).encode())
    assert [(problem.kind, problem.where) for problem in _verify(path).problems] == [("bad_history", "entry 8")]


@pytest.mark.damages
@pytest.mark.parametrize("what", ["segments", "manifests", "locators"])
def test_what_was_deleted_without_a_prune_is_said_to_be(what: str, tmp_path: Path) -> None:
    """Files of a snapshot gone, no prune entry: kind ``missing``, and the message says that no entry allows it."""
    path = tmp_path / "chain"
    ids = _chain(path)
    gone = {
        "segments": layout.segment(ids[2], 0, 0),
        "manifests": layout.manifest_root(ids[2]),
        "locators": layout.locator(ids[2], 0),
    }[what]
    (path / gone).unlink()
    problems = _verify(path, deep=False).problems
    assert {(problem.kind, problem.snapshot, problem.where) for problem in problems} == {("missing", ids[2], gone)}
    assert "no prune entry" in problems[0].message
