"""Who attacks a chain, what finds it out, and what cannot: the threat table of docs/chain.md, row by row.

Seen here by somebody with nothing but the folder: no key, no pin, no policy. What such a reader cannot find out stands
here too, as a test that says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.errors import IntegrityError
from ciuic_async.format import entry, layout, merkle
from ciuic_async.format.entry import KeyEntry
from ciuic_async.transparency import proof, slots, tiles
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from tests.chain.logs import COMMON
from tests.chain.victim import SIZE, STEPS, Victim, away, found, make_victim, restored, rewrite, verify

pytestmark = [pytest.mark.damages]

EDGE = layout.tile(0, 0, SIZE)
BUNDLE = layout.entry_bundle(0, SIZE)
HEAD = layout.LOG_HEAD


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    folder = tmp_path_factory.mktemp("victim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))  # who attacks or reads later has a home of their own
        made = make_victim(folder / "chain")
    assert verify(made.path).ok
    return made


@pytest.fixture
def victim(original: Victim, tmp_path: Path) -> Victim:
    return original.copy(tmp_path / "chain")


def segment_of(victim: Victim, number: int) -> str:
    return layout.segment(victim.ids[number], 0, 0)


# --- flips bits; truncates --------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """One bit in the last byte that is not padding."""
    at = len(data.rstrip(b"\0\n")) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


# place: (its name; kinds when a bit is flipped; when the end is cut off; what training goes on from)
PLACES: dict[str, tuple[Callable[[Victim], str], set[str], set[str], int | str]] = {
    "data": (lambda v: segment_of(v, 3), {"digest_mismatch"}, {"wrong_size", "truncated"}, STEPS - 1),
    "manifest": (lambda v: layout.manifest_root(v.ids[3]), {"digest_mismatch"}, {"digest_mismatch"}, STEPS - 1),
    "manifest part": (lambda v: layout.manifest_part(v.ids[3], 0), {"digest_mismatch"}, {"digest_mismatch"}, STEPS - 1),
    "locator": (lambda v: layout.locator(v.ids[3], 0), {"digest_mismatch"}, {"json_syntax"}, STEPS - 1),
    "entry bundle": (lambda v: BUNDLE, {"bundle_damaged"}, {"bundle_damaged"}, STEPS),
    "tile": (lambda v: EDGE, {"tile_damaged"}, {"tile_damaged"}, STEPS),
    "head": (lambda v: HEAD, {"signer_unknown"}, {"note_malformed"}, STEPS),
    "first slot": (lambda v: layout.slot(0), {"signer_unknown"}, {"slot_malformed"}, STEPS),
    "last slot": (lambda v: layout.slot(SIZE - 1), {"slot_mismatch"}, {"slot_malformed"}, STEPS),
}


@pytest.mark.parametrize("place", PLACES)
def test_flipped_bits_are_found(victim: Victim, place: str) -> None:
    """Verify names the file and how it knows; damage to data costs that snapshot, damage to the log costs nothing."""
    name_of, kinds, _, step = PLACES[place]
    victim.change(name_of(victim), flipped)
    assert found(verify(victim.path)) == {(kind, name_of(victim)) for kind in kinds}
    assert restored(victim.path, victim.key) == step


@pytest.mark.parametrize("place", PLACES)
def test_truncation_is_found(victim: Victim, place: str) -> None:
    """A file that ends early is named, and no part of it is used."""
    name_of, _, kinds, step = PLACES[place]
    victim.change(name_of(victim), truncated)
    assert found(verify(victim.path)) == {(kind, name_of(victim)) for kind in kinds}
    assert restored(victim.path, victim.key) == step


def test_another_chain_file_is_refused(victim: Victim) -> None:
    """With another origin no signature holds; with other parameters it is not the file that entry 0 pins."""
    good = victim.file(layout.CHAIN_FILE).read_bytes()
    victim.change(layout.CHAIN_FILE, lambda data: data.replace(b"4194304", b"2097152"))
    assert found(verify(victim.path)) == {("digest_mismatch", layout.CHAIN_FILE)}
    with SnapshotChain(victim.path, create=False) as chain:
        origin = chain.origin.encode()
    victim.put(layout.CHAIN_FILE, good.replace(origin, origin[:-4] + bytes(reversed(origin[-4:]))))
    kinds = {kind for kind, where in found(verify(victim.path)) if where == layout.CHAIN_FILE}
    assert kinds == {"not_pinned"}
    assert isinstance(restored(victim.path, victim.key), str)


# --- removes snapshots, reorders, inserts and removes entries ---------------------------------------------------------


def test_an_old_snapshot_that_is_deleted_is_missed(victim: Victim) -> None:
    """Its entry is there, its files are not, and no prune entry says that this was meant."""
    victim.delete_snapshot(victim.ids[0])
    report = verify(victim.path)
    assert {(problem.kind, problem.snapshot) for problem in report.problems} == {("missing", victim.ids[0])}
    assert restored(victim.path, victim.key) == STEPS


def test_a_snapshot_that_is_pruned_is_not_missed(victim: Victim) -> None:
    """The same files gone, but by a signed prune entry: no problem. It is the entry that makes the difference."""
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        chain.prune(KeepLatest(STEPS - 1))
        assert chain.verify().ok
    assert not victim.file(segment_of(victim, 0)).exists()


def test_the_latest_snapshot_that_is_deleted_is_missed(victim: Victim) -> None:
    """As long as the log stays what it is; training goes on from the one before it, with a warning."""
    victim.delete_snapshot(victim.ids[-1])
    report = verify(victim.path)
    assert {(problem.kind, problem.snapshot) for problem in report.problems} == {("missing", victim.ids[-1])}
    with pytest.warns(match="is missing"), Checkpointer(victim.path, {"w": torch.zeros(2000)}, rng=False) as ckpt:
        progress = ckpt.restore()
    assert progress is not None
    assert progress.step == STEPS - 1


@pytest.fixture
def rolled_back(victim: Victim, tmp_path: Path) -> Victim:
    """The store as it was one snapshot earlier: a copy that was kept."""
    older = victim.copy(tmp_path / "older")
    older.delete_snapshot(victim.ids[-1])
    entries = victim.entries()[:-1]
    older.delete(layout.slot(SIZE - 1), EDGE, BUNDLE, HEAD)
    older.log().repair(victim.key)  # no theft: the head that he kept from then has the same bytes
    assert older.entries() == entries
    return older


def test_removed_newest_snapshots_are_not_found_by_a_fresh_reader(rolled_back: Victim) -> None:
    """A chain that ends earlier is a good chain: without a pin, a witness or a bound of age nobody can tell."""
    report = verify(rolled_back.path)
    assert report.ok
    assert "integrity only" in report.level
    assert restored(rolled_back.path, rolled_back.key) == STEPS - 1


def test_removed_newest_snapshots_do_not_fool_who_saw_them(victim: Victim, rolled_back: Victim) -> None:
    """Who has the chain open keeps what he read: his view never gets shorter, and a writer forks no history."""
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        seen = [snapshot.id for snapshot in chain]
        shutil.rmtree(victim.path / "log")
        shutil.copytree(rolled_back.path / "log", victim.path / "log")
        assert [snapshot.id for snapshot in chain] == seen
        chain.note("written after the store was rolled back")
        assert [item["index"] for item in chain.log()] == list(range(SIZE + 1))
    # The slot that was taken away stays away, and so verify tells everybody; the entries are in the bundle.
    assert found(verify(victim.path)) == {("missing", layout.slot(SIZE - 1))}


def replace_derived(victim: Victim, entries: list[bytes]) -> None:
    """Tile and bundle of other entries, consistent with each other, under the old head."""
    victim.put(BUNDLE, tiles.encode_bundle(entries))
    victim.put(EDGE, tiles.encode_tile([merkle.leaf_hash(data) for data in entries]))


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "reordered": lambda entries: [*entries[:2], entries[3], entries[2], entries[4]],
    "replaced": lambda entries: [*entries[:3], entries[3].replace(b'"step":3', b'"step":9'), entries[4]],
    "repeated": lambda entries: [*entries[:4], entries[3]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_entries_in_tiles_and_bundles_are_found(victim: Victim, change: str) -> None:
    """Tile and bundle agree with each other, and with no signature: the root is another. Readers take the slots."""
    entries = victim.entries()
    replace_derived(victim, CHANGES[change](entries))
    assert {where for _, where in found(verify(victim.path))} == {EDGE, BUNDLE}
    assert ("tile_damaged", EDGE) in found(verify(victim.path))
    with pytest.warns(match="slots are used instead"):
        assert victim.entries() == entries


@pytest.mark.parametrize("change", CHANGES)
def test_other_entries_in_slots_are_found(victim: Victim, change: str) -> None:
    """Without a key of the log a slot's bundle is not the signed one."""
    entries = victim.entries()
    for number, (before, after) in enumerate(zip(entries, CHANGES[change](entries), strict=True)):
        if before != after:
            victim.change(layout.slot(number), lambda data, pair=(before, after): swap(data, *pair))  # type: ignore[misc]
    kinds = {kind for kind, where in found(verify(victim.path)) if where.startswith(layout.SLOTS)}
    assert kinds == {"slot_mismatch"}


def swap(data: bytes, before: bytes, after: bytes) -> bytes:
    """A slot file with another entry in it, its lengths right."""
    header, _, rest = data.partition(b"\n")
    magic, note_bytes, _ = header.split(b" ")
    note = rest[: int(note_bytes)]
    bundle = rest[int(note_bytes) :].replace(tiles.encode_bundle([before]), tiles.encode_bundle([after]))
    return b"%s %d %d\n" % (magic, len(note), len(bundle)) + note + bundle


# --- slots: forged, replayed, moved, deleted --------------------------------------------------------------------------


def next_slot(victim: Victim) -> str:
    return layout.slot(SIZE)


def test_a_forged_slot_is_refused(victim: Victim) -> None:
    """Who can write to the store and has no key of the log: his slot blocks the log until it is taken away, no more."""
    log = victim.log()
    log.refresh()
    forger = SigningKey.generate()
    forged = slots.encode_slot(log.head, [entry.NoteEntry(COMMON, "by nobody").encode()], forger, log.origin)
    victim.put(next_slot(victim), forged)
    assert found(verify(victim.path)) == {("signer_unknown", next_slot(victim))}
    assert restored(victim.path, victim.key) == "signer_unknown"
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain, pytest.raises(IntegrityError) as caught:
        chain.note("not written")
    assert caught.value.kind == "signer_unknown"
    victim.delete(next_slot(victim))
    assert restored(victim.path, victim.key) == STEPS


def test_a_replayed_slot_is_refused(victim: Victim) -> None:
    """A genuine slot put under the next free name was signed to follow another tree."""
    victim.put(next_slot(victim), victim.file(layout.slot(SIZE - 1)).read_bytes())
    assert found(verify(victim.path)) == {("slot_mismatch", next_slot(victim))}
    assert restored(victim.path, victim.key) == "slot_mismatch"


def test_a_slot_of_another_chain_is_refused(victim: Victim, tmp_path: Path) -> None:
    """Even if one key signs both: the origin is in every signature."""
    with SnapshotChain(tmp_path / "other", key=victim.key.secret()) as other:
        for number in range(SIZE):
            other.note(str(number))
    victim.put(next_slot(victim), (tmp_path / "other" / layout.slot(SIZE)).read_bytes())
    (kind,) = {kind for kind, where in found(verify(victim.path)) if where == next_slot(victim)}
    assert kind == "slot_malformed"
    assert restored(victim.path, victim.key) == "slot_malformed"


def test_a_moved_slot_is_found(victim: Victim) -> None:
    """At its own place it is missing, at another one no history leads to it; its entries come from the bundle."""
    victim.file(layout.slot(2)).rename(victim.file(layout.slot(1)))
    assert found(verify(victim.path)) == {("missing", layout.slot(2)), ("stray_slot", layout.slot(1))}
    victim.file(layout.slot(1)).rename(victim.file(layout.slot(9)))
    assert found(verify(victim.path)) == {
        ("missing", layout.slot(2)),
        ("missing", next_slot(victim)),
        ("unreachable", layout.slot(9)),
    }
    assert restored(victim.path, victim.key) == STEPS


@pytest.mark.parametrize("numbers", [(2,), (0,), (SIZE - 1,), (0, 2, 3, 4)])
def test_deleted_slots_are_found(victim: Victim, numbers: tuple[int, ...]) -> None:
    """Under a signed head every slot is accounted for. Reading goes on by the tiles."""
    victim.delete(*(layout.slot(number) for number in numbers))
    problems = found(verify(victim.path))
    assert ("missing", layout.slot(numbers[0])) in problems
    assert {kind for kind, _ in problems} == {"missing"}
    assert restored(victim.path, victim.key) == STEPS


# --- keys: his own, or a stolen one -----------------------------------------------------------------------------------


def test_a_strangers_key_that_announces_itself_may_append(victim: Victim) -> None:
    """Not refused, by design: nodes announce their keys. It shows among the keys, and a policy can refuse it."""
    stranger = SigningKey.generate()
    with SnapshotChain(victim.path, key=stranger.secret()) as chain:
        chain.note("by somebody")
        assert chain.keys() == [victim.key.vkey(chain.origin), stranger.vkey(chain.origin)]
        assert chain.verify().ok
        kinds = [item["kind"] for item in chain.log()]
    assert kinds[SIZE:] == ["key", "note"]


def replaced(victim: Victim, to: Path) -> Victim:
    """The whole log by another key from entry 0 on: same snapshots, one of them with another loss."""
    thief = SigningKey.generate()
    entries = victim.entries()
    origin = victim.log().origin
    first = entry.decode(entries[0], 0)
    assert isinstance(first, KeyEntry)
    own = KeyEntry(first.common, thief.vkey(origin), first.chain).encode()
    return rewrite(victim, to, [own, *map(embellish, entries[1:])], thief)


def embellish(data: bytes) -> bytes:
    """The entry of the second snapshot with a better loss."""
    return data.replace(b'["loss","0.5"]', b'["loss","0.1"]')


def test_a_store_replaced_under_another_key_is_not_found_by_a_fresh_reader(victim: Victim, tmp_path: Path) -> None:
    """It is whole in itself. Only who knows the right key from elsewhere can tell: the keys are all that differs."""
    other = replaced(victim, tmp_path / "replaced")
    report = verify(other.path)
    assert report.ok
    assert "integrity only" in report.level
    with SnapshotChain(other.path, create=False) as chain, SnapshotChain(victim.path, create=False) as genuine:
        assert chain.origin == genuine.origin
        assert chain.get("best:loss").step == 2, "it is believed"
        assert set(chain.keys()).isdisjoint(genuine.keys())


def rewritten(victim: Victim, to: Path) -> Victim:
    """History changed by the holder of the writer's own key."""
    announcement, *rest = victim.entries()
    return rewrite(victim, to, [announcement, *map(embellish, rest)], victim.key)


def test_history_rewritten_with_a_stolen_key_is_not_found_by_a_fresh_reader(victim: Victim, tmp_path: Path) -> None:
    """Every signature is genuine, the manifest still fits: no key and no policy tells; a pin, a witness, a copy do."""
    other = rewritten(victim, tmp_path / "rewritten")
    assert verify(other.path).ok
    with SnapshotChain(other.path, create=False) as chain, SnapshotChain(victim.path, create=False) as genuine:
        assert chain.keys() == genuine.keys()
        assert chain.get("best:loss").step == 2


@pytest.mark.parametrize("how", [rewritten, replaced])
def test_another_history_is_a_fork_for_who_saw_the_first(
    victim: Victim, tmp_path: Path, how: Callable[[Victim, Path], Victim]
) -> None:
    """Who has the chain open refuses to go on, reading or writing."""
    other = how(victim, tmp_path / "other")
    with away(tmp_path), SnapshotChain(other.path, key=victim.key.secret()) as longer:
        longer.note("the other history goes on")
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        assert chain.latest() is not None
        shutil.rmtree(victim.path / "log")
        shutil.copytree(other.path / "log", victim.path / "log")
        with pytest.raises(IntegrityError) as caught:
            chain.latest()
        with pytest.raises(IntegrityError) as again:
            chain.note("not written")
    assert (caught.value.kind, again.value.kind) == ("fork", "fork")


def test_a_stolen_key_may_append_falsehoods(victim: Victim) -> None:
    """Nothing cryptographic helps: the entry says what the thief says. Whose run and host it names is for people."""
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        chain.tag("release", "step:1")
        assert chain.verify().ok
        newest = chain.log()[-1]
    assert (newest["kind"], newest["name"]) == ("tag", "release")


def test_two_histories_shown_to_two_readers_cannot_be_reconciled(victim: Victim, tmp_path: Path) -> None:
    """Each is good to who sees it alone; whoever gets to see both heads has the proof that the writer lied."""
    left, right = victim.copy(tmp_path / "left"), victim.copy(tmp_path / "right")
    for side, text in ((left, "to you"), (right, "to them")):
        with away(side.path.with_suffix(".home")), SnapshotChain(side.path, key=victim.key.secret()) as chain:
            chain.note(text)
            chain.note("and more")
        assert verify(side.path).ok
    one, other = left.log(), right.log()
    one.refresh()
    other.refresh()
    assert one.head.size == other.head.size
    assert one.head.root != other.head.root
    for size in range(1, SIZE + 1):  # up to where they part they agree
        proof.check_consistency(size, other.head.size, root_at(one, size), other.head.root, other.consistency(size))
    parted, shown = root_at(one, SIZE + 1), other.consistency(SIZE + 1)
    with pytest.raises(IntegrityError) as caught:
        proof.check_consistency(SIZE + 1, other.head.size, parted, other.head.root, shown)
    assert caught.value.kind == "proof_invalid"


def root_at(log: Log, size: int) -> bytes:
    """The root that a reader of ``log`` saw when it had this size."""
    return merkle.root([log.leaf_hash(index) for index in range(size)])


def test_deleted_slots_let_a_fresh_writer_fork(victim: Victim, rolled_back: Victim) -> None:
    """Slots and head rolled back together: a writer that never saw more writes another entry at the same index.

    His own pin would have refused; a witness refuses the second of the two heads.
    """
    with SnapshotChain(rolled_back.path, key=victim.key.secret()) as chain:
        chain.note("in the place of the fourth snapshot")
        assert chain.verify().ok
    assert len(rolled_back.entries()) == len(victim.entries())
    assert rolled_back.entries()[:-1] == victim.entries()[:-1]
    assert rolled_back.entries()[-1] != victim.entries()[-1]
