"""Rollbacks, tags and notes: what entries mean together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import Checkpointer, IntegrityError, KeepLatest, NotFoundError, SnapshotChain, UsageError
from ciuic_async.format import entry as entries
from ciuic_async.format.entry import Common
from ciuic_async.format.merkle import leaf_hash
from ciuic_async.pipeline import history
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log

COMMON = Common("fedcba9876543210fedc", "2026-11-22T06:31:14.123Z", "node-3", "ciuic_async/1.0.0")
ORIGIN = "ciuic.dev/chain/" + "0f" * 16
HASH = bytes(32)


def snapshot(number: int, tags: tuple[str, ...] = ()) -> bytes:
    name = f"{number:020x}"
    return entries.SnapshotEntry(
        COMMON,
        name,
        None,
        number,
        None,
        None,
        tags,
        (),
        entries.FileReference(f"manifests/{name}/root.json", HASH, 1),
        entries.ChunkTree(HASH, 0),
        0,
        0,
    ).encode()


def log_of(lines: list[bytes]) -> Log:
    key = SigningKey.generate()
    log = Log(MemoryStore(), ORIGIN)
    announcement = entries.KeyEntry(COMMON, key.vkey(ORIGIN)).encode()
    log.append(lambda _: lines, key, announce=lambda: announcement)
    return log


@dataclass
class Model:
    """The same rules forwards: the line after each snapshot is remembered, and a rollback brings one of them back."""

    lines: list[bytes] = field(default_factory=list)
    leaves: dict[int, bytes] = field(default_factory=dict)
    after: dict[int, list[int]] = field(default_factory=dict)
    line: list[int] = field(default_factory=list)
    pruned: set[int] = field(default_factory=set)
    tags: dict[str, int] = field(default_factory=dict)

    def save(self, tag: str | None) -> None:
        number = len(self.leaves)
        data = snapshot(number, () if tag is None else (tag,))
        self.lines.append(data)
        self.leaves[number] = leaf_hash(data)
        self.line = [*self.line, number]
        self.after[number] = self.line
        if tag is not None:
            self.tags[tag] = number

    def prune(self, numbers: set[int]) -> None:
        self.lines.append(entries.PruneEntry(COMMON, tuple(f"{n:020x}" for n in sorted(numbers)), "any").encode())
        self.pruned |= numbers

    def rollback(self, number: int | None) -> None:
        leaf = self.leaves[number] if number is not None else b"\xab" * 32
        self.lines.append(entries.RollbackEntry(COMMON, leaf, "why").encode())
        if number is not None and number not in self.pruned:
            self.line = self.after[number]

    def tag(self, tag: str, number: int | None) -> None:
        self.lines.append(entries.TagEntry(COMMON, tag, None if number is None else f"{number:020x}").encode())
        if number is None:
            self.tags.pop(tag, None)
        else:
            self.tags[tag] = number


@st.composite
def models(draw: st.DrawFn) -> Model:
    model = Model()
    for _ in range(draw(st.integers(0, 14))):
        known = sorted(model.leaves)
        kind = draw(st.sampled_from(["save", "save", "prune", "rollback", "rollback", "tag"] if known else ["save"]))
        if kind == "save":
            model.save(draw(st.sampled_from([None, "a", "b"])))
        elif kind == "prune":
            model.prune(draw(st.sets(st.sampled_from(known), min_size=1)))
        elif kind == "rollback":
            model.rollback(draw(st.none() | st.sampled_from(known)))
        else:
            model.tag(draw(st.sampled_from("ab")), draw(st.none() | st.sampled_from(known)))
    return model


@given(models())
def test_the_line_follows_every_rollback(model: Model) -> None:
    """Walking backwards over the log gives what replaying it forwards does: also over rollbacks of rollbacks, to
    abandoned branches, to what is pruned, and to nothing."""
    log = log_of(model.lines)
    found = [line.entry.step for line in history.the_line(log)]
    assert found == [number for number in reversed(model.line) if number not in model.pruned]


@given(models())
def test_a_tag_belongs_to_who_got_it_last(model: Model) -> None:
    """Looking a tag up and listing all tags agree with replaying the log; a pruned bearer has none, nor has another."""
    log = log_of(model.lines)
    expected = {tag: number for tag, number in model.tags.items() if number not in model.pruned}
    for tag in "ab":
        bearer = history.tagged(log, tag)
        assert (None if bearer is None else bearer.entry.step) == expected.get(tag)
    listed = {tag: int(name, 16) for name, tags in history.tags(log).items() for tag in tags}
    assert listed == expected


@given(models())
def test_retention_sees_every_living_snapshot_once_and_the_latest_last(model: Model) -> None:
    """Abandoned snapshots come first, so that rules over the newest keep what training goes on from."""
    log = log_of(model.lines)
    order = [int(entry.snapshot, 16) for entry in history.for_retention(log)]
    line = [number for number in model.line if number not in model.pruned]
    assert sorted(order) == sorted(set(model.leaves) - model.pruned)
    assert order[len(order) - len(line) :] == line


# --- through the chain ------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[SnapshotChain]:
    """Steps 1 to 4 of a tensor that holds its step."""
    with SnapshotChain(tmp_path / "chain") as chain:
        state = {"t": torch.zeros(4)}
        with Checkpointer(chain, state, rng=False) as ckpt:
            for step in range(1, 5):
                state["t"].fill_(step)
                ckpt.step(epoch=step)
                ckpt.save(metrics={"loss": 1 / step})
        yield chain


def entry_bytes(chain: SnapshotChain) -> list[bytes]:
    return [chain._log.entry_bytes(index) for index in range(len(chain._log))]


def step_of_latest(chain: SnapshotChain) -> int | None:
    latest = chain.latest()
    assert latest is not None
    return latest.step


def test_a_rollback_adds_one_entry_and_changes_none(chain: SnapshotChain) -> None:
    """The latest is the target, bit for bit; every earlier entry is the one it was; all snapshots can still be read."""
    before = entry_bytes(chain)
    target = chain.rollback("step:2", "loss spike")
    assert entry_bytes(chain)[:-1] == before
    latest = chain.latest()
    assert latest is not None
    assert (latest.id, latest.step) == (target.id, 2)
    assert torch.equal(latest.load()["t"], torch.full((4,), 2.0))
    assert [one.step for one in chain] == [1, 2, 3, 4]
    assert torch.equal(chain.get("step:4").load()["t"], torch.full((4,), 4.0))
    listed = chain.log()
    assert (listed[-1]["kind"], listed[-1]["target"], listed[-1]["reason"]) == ("rollback", target.id, "loss spike")
    assert [one["abandoned"] for one in listed if one["kind"] == "snapshot"] == [False, False, True, True]
    assert chain.verify().ok


def test_training_goes_on_from_the_target(chain: SnapshotChain) -> None:
    """What is restored is the target, the next snapshot's parent is the target, and it is the latest then."""
    target = chain.rollback("step:2")
    state = {"t": torch.zeros(4)}
    with Checkpointer(chain, state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert progress.snapshot.id == target.id
        assert torch.equal(state["t"], torch.full((4,), 2.0))
        ckpt.step()
        saved = ckpt.save().wait_durable()
    assert saved.parent == target.id
    assert chain.get("latest").id == saved.id
    assert [chain.get(ref).step for ref in ("latest~1", "latest~2", "step:4")] == [2, 1, 4]
    assert chain.get("step:3").id == saved.id  # not the abandoned one


@pytest.mark.damages
def test_damage_falls_back_along_the_line(chain: SnapshotChain, tmp_path: Path) -> None:
    """If the target of a rollback is damaged, what is restored is older than it, not what was abandoned."""
    target = chain.rollback("step:2")
    victim = tmp_path / "chain" / "manifests" / target.id / "root.json"
    victim.chmod(0o644)
    victim.write_bytes(b"{}")
    with Checkpointer(chain, {"t": torch.zeros(4)}, rng=False) as ckpt, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        progress = ckpt.restore()
    assert progress is not None
    assert progress.step == 1
    assert [skipped for skipped, _ in progress.skipped] == [target.id]


def test_a_rollback_can_be_rolled_back(chain: SnapshotChain) -> None:
    """Rolling back to the abandoned branch brings all of it back; to the latest itself writes nothing."""
    newest = chain.get("latest").id
    chain.rollback("step:1")
    chain.rollback(newest)
    size = len(chain._log)
    assert chain.rollback("latest").id == newest
    assert len(chain._log) == size
    assert [one.step for one in chain.newest_first()] == [4, 3, 2, 1]


@pytest.mark.damages
def test_only_what_can_be_read_is_rolled_back_to(chain: SnapshotChain, tmp_path: Path) -> None:
    """A ref to nothing, a pruned snapshot and a damaged manifest are refused; history stays as it is."""
    oldest = chain.get("step:1").id
    second = chain.get("step:2").id
    chain.prune(KeepLatest(3))
    size = len(chain._log)
    for ref in ("step:9", oldest):
        with pytest.raises(NotFoundError):
            chain.rollback(ref)
    manifest = tmp_path / "chain" / "manifests" / second / "root.json"
    manifest.chmod(0o644)
    manifest.write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        chain.rollback(second)
    with pytest.raises(UsageError):
        chain.rollback("latest~1", reason="x" * 20_000)
    assert len(chain._log) == size


def test_retention_drops_what_was_abandoned_first(chain: SnapshotChain) -> None:
    """KeepLatest keeps the target of a rollback, whatever is newer by the log."""
    chain.rollback("step:2")
    chain.prune(KeepLatest(1))
    assert [one.step for one in chain] == [2]
    assert step_of_latest(chain) == 2
    assert chain.verify().ok


def test_the_latest_is_never_pruned(chain: SnapshotChain) -> None:
    """A policy that keeps nothing keeps the latest all the same."""

    class Nothing:
        def keep(self, snapshots: object) -> set[str]:
            return set()

        def describe(self) -> str:
            return "Nothing()"

    chain.rollback("step:3")
    report = chain.prune(Nothing())
    assert [one.step for one in chain] == [3]
    assert len(report.pruned) == 3


def test_tags_are_refs_and_can_move(chain: SnapshotChain) -> None:
    """A tag names the snapshot that got it last, and nobody once it is taken away or its bearer is pruned."""
    chain.tag("release", "step:2")
    assert chain.get("release").step == 2
    assert chain.get("release~1").step == 1
    size = len(chain._log)
    chain.tag("release", "step:2")  # it has it
    assert len(chain._log) == size
    chain.tag("release", "best:loss")
    assert {one.step: one.tags for one in chain} == {1: (), 2: (), 3: (), 4: ("release",)}
    chain.tag("release", None)
    for gone in (lambda: chain.get("release"), lambda: chain.tag("release", None)):
        with pytest.raises(NotFoundError):
            gone()
    chain.tag("old", "step:1")
    chain.prune(KeepLatest(3))
    with pytest.raises(NotFoundError):
        chain.get("old")
    assert chain.verify().ok


@pytest.mark.parametrize("name", ["latest", "step:3", "best:loss", "latest~1", "a~b", "", "x" * 201, "a\nb"])
def test_a_tag_that_means_something_else_is_refused(name: str, chain: SnapshotChain) -> None:
    """A tag can be used as a ref, so it must not be one of another kind."""
    with pytest.raises(UsageError):
        chain.tag(name, "latest")


def test_notes_are_part_of_history(chain: SnapshotChain) -> None:
    """A remark is an entry: it is listed, and the chain is as good as before."""
    chain.note("moved to the new cluster\nafter this")
    assert chain.log()[-1]["kind"] == "note"
    assert chain.log()[-1]["text"] == "moved to the new cluster\nafter this"
    assert chain.verify().ok


def test_a_snapshot_knows_its_tags(chain: SnapshotChain) -> None:
    """Tags of save and of later entries are one list."""
    with Checkpointer(chain, {"t": torch.ones(4)}, rng=False) as ckpt:
        ckpt.restore()
        ckpt.save(tags=["a", "b"]).wait_durable()
    chain.tag("c", "latest")
    chain.tag("a", "step:1")
    assert chain.get("latest").tags == ("b", "c")
    assert chain.get("step:1").tags == ("a",)


def test_very_many_rollbacks_to_nowhere_cost_no_more_than_reading_the_log() -> None:
    """Whoever has a key can write a hundred thousand of them; each is passed over, and none is a search of its own."""
    key = SigningKey.generate()
    log = Log(MemoryStore(), ORIGIN)
    first, second = snapshot(1), snapshot(2)
    gone = entries.PruneEntry(COMMON, (f"{2:020x}",), "any").encode()
    nowhere = [entries.RollbackEntry(COMMON, number.to_bytes(32, "big"), "no").encode() for number in range(1500)]
    pruned = [entries.RollbackEntry(COMMON, leaf_hash(second), f"{number}").encode() for number in range(1500)]
    lines = [first, second, gone, *nowhere, *pruned, snapshot(3), pruned[0]]
    log.append(lambda _: lines, key, announce=lambda: entries.KeyEntry(COMMON, key.vkey(ORIGIN)).encode())
    read = 0
    entry = log.entry

    def counted(index: int) -> entries.Entry:
        nonlocal read
        read += 1
        return entry(index)

    log.entry = counted  # type: ignore[method-assign]
    assert [line.entry.step for line in history.the_line(log)] == [3, 1]
    assert read < 3 * len(lines)


def test_distant_ancestors_are_found_in_one_pass(tmp_path: Path) -> None:
    """``latest~300`` looks at every entry once, and not three hundred times at all of them."""
    key = SigningKey.generate()
    log = Log(MemoryStore(), ORIGIN)
    lines: list[bytes] = []
    for number in range(400):
        made = entries.decode(snapshot(number), number)
        assert isinstance(made, entries.SnapshotEntry)
        lines.append(replace(made, parent=leaf_hash(lines[-1]) if lines else None).encode())
    log.append(lambda _: lines, key, announce=lambda: entries.KeyEntry(COMMON, key.vkey(ORIGIN)).encode())
    read = 0
    entry = log.entry

    def counted(index: int) -> entries.Entry:
        nonlocal read
        read += 1
        return entry(index)

    log.entry = counted  # type: ignore[method-assign]
    assert history.resolve_ref(log, "latest~300").entry.step == 99
    assert read < 3 * len(lines)
    with pytest.raises(NotFoundError):
        history.resolve_ref(log, "latest~400")
