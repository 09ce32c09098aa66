"""The audit names every file of a log that is not as it should be, and no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from ciuic_async.errors import StoreError
from ciuic_async.format import entry, layout, merkle
from ciuic_async.format.entry import KeyEntry, PruneEntry
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import note, slots, tiles
from ciuic_async.transparency.audit import Problem, audit, audit_log
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead

ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")
KEY = SigningKey.generate()


def line(text: str) -> bytes:
    return PruneEntry(COMMON, (), text).encode()


def announcement(key: SigningKey = KEY) -> bytes:
    return KeyEntry(COMMON, key.vkey(ORIGIN)).encode()


def add(store: MemoryStore, *texts: str) -> Log:
    log = Log(store, ORIGIN)
    log.append(lambda _: [line(text) for text in texts], KEY, announce=announcement)
    return log


@pytest.fixture
def store() -> MemoryStore:
    """601 entries in three slots: full and partial tiles on two levels, one superseded partial tile."""
    store = MemoryStore()
    for start in range(0, 600, 200):
        add(store, *map(str, range(start, start + 200)))
    return store


def names_of(problems: Sequence[Problem]) -> set[str]:
    return {problem.where for problem in problems}


def test_an_intact_log_has_no_problem_and_gives_its_entries(store: MemoryStore) -> None:
    """The audit of an intact log finds nothing, and gives the verified entries, hashes, keys and head."""
    log = Log(store, ORIGIN)
    log.refresh()
    found = audit_log(store, ORIGIN)
    assert found.problems == []
    assert found.entries == [item for _, item in log.entries()]
    assert found.leaf_hashes == [log.leaf_hash(index) for index in range(601)]
    assert found.head == log.head
    assert {key_id: str(vkey) for key_id, vkey in found.keys.items()} == log.known_keys()


def test_an_empty_log_has_no_problem() -> None:
    """A log without files is empty, which is no problem."""
    assert audit_log(MemoryStore(), ORIGIN).problems == []


def test_each_damaged_or_missing_file_is_named_alone(store: MemoryStore) -> None:
    """Each file of a log damaged or (where something implies it) removed alone gives problems that name just that
    file, and all entries are still verified.
    """
    whole = audit_log(store, ORIGIN)
    for listed in list(store.list()):
        data = store.read(listed.name, 1 << 30)
        for bad in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"x", b"", None):
            store.delete(listed.name)
            if bad is not None:
                store.overwrite(listed.name, bad)
            found = audit_log(store, ORIGIN)
            if bad is None and listed.name == "log/tile/1/000.p/1":
                assert found.problems == []  # superseded: nothing needs it
            else:
                assert names_of(found.problems) == {listed.name}, (listed.name, bad)
            assert found.entries == whole.entries
        store.overwrite(listed.name, data)
    assert audit_log(store, ORIGIN).problems == []


def test_every_bit_flip_of_every_file_is_found() -> None:
    """No bit of any file of a small chain's log can change unnoticed, and the file is named."""
    store = MemoryStore()
    log = add(store, "a")
    store.create(layout.slot(2), slots.encode_slot(log.head, [line("b")], KEY, ORIGIN))
    for listed in list(store.list()):
        data = store.read(listed.name, 1 << 20)
        for bit in range(len(data) * 8):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << (bit % 8)
            store.overwrite(listed.name, bytes(changed))
            assert listed.name in names_of(list(audit(store, ORIGIN)))
        store.overwrite(listed.name, data)


def test_files_behind_the_slots_are_no_problem(store: MemoryStore) -> None:
    """A writer that died after its claim, or before any file but the slot, leaves a log without problems."""
    log = Log(store, ORIGIN)
    store.create(layout.slot(601), slots.encode_slot(log.refresh(), [line("x")], KEY, ORIGIN))
    found = audit_log(store, ORIGIN)
    assert (found.problems, len(found.entries)) == ([], 602)
    fresh = MemoryStore()
    fresh.create(layout.slot(0), slots.encode_slot(LogHead(0, merkle.EMPTY_ROOT), [announcement()], KEY, ORIGIN))
    assert audit_log(fresh, ORIGIN).problems == []


def test_unknown_names_and_files_beyond_the_log_are_problems(store: MemoryStore) -> None:
    """Names that the format does not have, tiles of entries that nobody signed, and slots off the history are named."""
    slot = store.read(layout.slot(0), 1 << 20)
    strange = {
        "log/extra": b"",
        "log/tile/0/x000/000": b"",
        "log/tile/0/000.p/0": b"",
        "log/tile/0/000.p/999": b"",
        "log/tile/0/003": bytes(8192),
        "log/tile/entries/002.p/200": b"",
        "log/tile/2/000.p/1": bytes(32),
        layout.slot(100): slot,
        layout.slot(9999): slot,
    }
    for name, data in strange.items():
        store.create(name, data)
    assert names_of(audit_log(store, ORIGIN).problems) >= set(strange)


def test_a_removed_slot_in_the_middle_is_named(store: MemoryStore) -> None:
    """The slots before and after a missing one are still checked, with the entries the signed head vouches for."""
    store.delete(layout.slot(201))
    found = audit_log(store, ORIGIN)
    assert names_of(found.problems) == {layout.slot(201)}
    assert len(found.entries) == 601


def test_without_a_head_what_cannot_be_checked_is_named(store: MemoryStore) -> None:
    """With a slot and the head gone nothing vouches for later entries: files that hold them are problems."""
    store.delete(layout.slot(201))
    store.delete("log/checkpoint")
    found = audit_log(store, ORIGIN)
    assert {layout.slot(201), layout.slot(401), "log/tile/0/001", "log/tile/entries/001"} <= names_of(found.problems)
    assert len(found.entries) == 201


def test_a_head_that_contradicts_the_slots_is_a_fork(store: MemoryStore) -> None:
    """A head signed with a good key for another root of a size that the slots have, or beyond them, is a problem."""
    for size, kind in ((601, "fork"), (300, "fork"), (700, "head_mismatch")):
        head = KEY.sign(ORIGIN, note.head_text(ORIGIN, size, bytes(32)))
        store.overwrite("log/checkpoint", head.encode())
        found = audit_log(store, ORIGIN)
        assert (kind, "log/checkpoint") in {(problem.kind, problem.where) for problem in found.problems}
        assert found.head is None


def test_a_head_of_another_log_or_by_a_stranger_is_named(store: MemoryStore) -> None:
    """Only a key of this log may sign its head, under its name."""
    root = Log(store, ORIGIN).refresh().root
    for data in (
        SigningKey.generate().sign(ORIGIN, note.head_text(ORIGIN, 601, root)),
        KEY.sign("other", note.head_text("other", 601, root)),
    ):
        store.overwrite("log/checkpoint", data.encode())
        assert names_of(audit_log(store, ORIGIN).problems) == {"log/checkpoint"}


def test_entries_that_are_none_are_named() -> None:
    """A key holder can sign anything; what is no entry, or a key entry without a good key, is named by its index."""
    store = MemoryStore()
    other = KeyEntry(COMMON, KEY.vkey("another")).encode()
    broken = KeyEntry(COMMON, "no key").encode()
    entries = [line("first"), announcement(), other, broken, b"{}", line("last")]
    store.create(layout.slot(0), slots.encode_slot(LogHead(0, merkle.EMPTY_ROOT), entries, KEY, ORIGIN))
    found = audit_log(store, ORIGIN)
    assert names_of(found.problems) == {"entry 0", "entry 2", "entry 3", "entry 4"}
    assert len(found.entries) == 4
    assert len(found.leaf_hashes) == 6


def test_links_in_the_log_are_named(tmp_path: Path) -> None:
    """A symbolic link in place of a file is a problem of that file, for head, slot, tile and bundle."""
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    log = Log(store, ORIGIN)
    log.append(lambda _: [line("a")], KEY, announce=announcement)
    log.append(lambda _: [line("b")], KEY, announce=announcement)
    assert audit_log(store, ORIGIN).problems == []
    for name in ("log/checkpoint", layout.slot(0), layout.slot(2), "log/tile/0/000.p/3", "log/tile/entries/000.p/3"):
        path = tmp_path / "chain" / name
        path.rename(tmp_path / "aside")
        path.symlink_to(tmp_path / "aside")
        assert name in names_of(audit_log(store, ORIGIN).problems)
        path.unlink()
        (tmp_path / "aside").rename(path)
    assert audit_log(store, ORIGIN).problems == []


class Unreadable(MemoryStore):
    """A store that cannot read one name, as a bad sector does."""

    bad = ""

    def read(self, name: str, limit_bytes: int) -> bytes:
        if name == self.bad:
            raise StoreError(f"{name}: I/O error", kind="eio", where=name)
        return super().read(name, limit_bytes)


def test_a_file_that_cannot_be_read_is_named_and_the_rest_checked() -> None:
    """An I/O error on one file is a problem of that file; the others are still checked."""
    store = Unreadable()
    for text in "ab":
        add(store, text)
    for listed in list(store.list()):
        store.bad = listed.name
        found = audit_log(store, ORIGIN)
        assert names_of(found.problems) == {listed.name}
        assert {problem.kind for problem in found.problems} == {"eio"}


def test_the_audit_writes_nothing(store: MemoryStore) -> None:
    """Files and their times are the same after an audit of a damaged log."""
    store.overwrite("log/tile/0/000", b"damaged")
    before = list(store.list())
    assert list(audit(store, ORIGIN))
    assert list(store.list()) == before
    assert tiles.WIDTH == 256


def test_bundles_that_do_not_give_the_signed_root_vouch_for_nothing(store: MemoryStore) -> None:
    """With a slot gone, entries from a bundle that was changed are not taken: what follows is named as unproven."""
    store.delete(layout.slot(201))
    name = "log/tile/entries/001"
    held = list(tiles.decode_bundle(store.read(name, 1 << 30), 256, name))
    store.overwrite(name, tiles.encode_bundle([*held[:-1], line("forged")]))
    found = audit_log(store, ORIGIN)
    assert {layout.slot(201), layout.slot(401), name} <= names_of(found.problems)
    assert len(found.entries) == 201


class Vanishing(MemoryStore):
    """A store in which a file goes, as if a writer deleted it, between being listed and being read."""

    name = ""

    def read(self, name: str, limit_bytes: int) -> bytes:
        if name == self.name:
            self.delete(name)
        return super().read(name, limit_bytes)


@pytest.mark.parametrize("folder", ["log/tile/0", "log/tile/entries"])
def test_a_partial_file_that_a_writer_deletes_meanwhile_is_no_problem(folder: str) -> None:
    """A partial tile or bundle that goes while it is audited is no problem beside the full one, and one without."""
    store = Vanishing()
    log = add(store, *map(str, range(200)))
    partial, full = f"{folder}/000.p/201", f"{folder}/000"
    held = store.read(partial, 1 << 30)
    log.append(lambda _: [line(str(number)) for number in range(200)], KEY, announce=announcement)
    assert store.size(partial) is None
    store.overwrite(partial, held)
    assert audit_log(store, ORIGIN).problems == []
    store.name = partial
    assert audit_log(store, ORIGIN).problems == []
    assert store.size(partial) is None
    store.overwrite(partial, held)
    store.delete(full)
    assert names_of(audit_log(store, ORIGIN).problems) == {partial, full}


def test_a_folder_in_place_of_a_tile_is_named(tmp_path: Path) -> None:
    """What no listing shows and the head needs is named once, with what is there instead of a file."""
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    Log(store, ORIGIN).append(lambda _: [line("a")], KEY, announce=announcement)
    for name in ("log/tile/0/000.p/2", "log/tile/entries/000.p/2"):
        (tmp_path / "chain" / name).unlink()
        (tmp_path / "chain" / name).mkdir()
    problems = audit_log(store, ORIGIN).problems
    assert sorted(problem.where for problem in problems) == ["log/tile/0/000.p/2", "log/tile/entries/000.p/2"]
    assert all(problem.message for problem in problems)


def test_a_key_of_a_later_kind_is_no_problem() -> None:
    """A later version may announce a key that this one cannot check: nothing it signs counts, nothing is damaged."""
    material = bytes([6]) + bytes(1312)
    key_id = sha256(ORIGIN.encode() + b"\n" + material).hexdigest()[:8]
    later = KeyEntry(COMMON, f"{ORIGIN}+{key_id}+{base64.b64encode(material).decode()}").encode()
    store = MemoryStore()
    Log(store, ORIGIN).append(lambda _: [later], KEY, announce=announcement)
    found = audit_log(store, ORIGIN)
    assert found.problems == []
    assert [str(key) for key in found.keys.values()] == [KEY.vkey(ORIGIN)]


class Counting(MemoryStore):
    """Counts how often bundles are read."""

    bundles = 0

    def read(self, name: str, limit_bytes: int) -> bytes:
        self.bundles += name.startswith(f"{layout.TILES}/entries/")
        return super().read(name, limit_bytes)


def test_very_many_damaged_slots_are_one_look_at_the_bundles() -> None:
    """Each damaged slot is named, what the others hold is checked, and the log is not read again for each of them."""
    store = Counting()
    for number in range(60):
        add(store, str(number))
    damaged = {layout.slot(size) for size in range(2, 60, 2)}
    for name in damaged:
        store.overwrite(name, b"garbage")
    store.bundles = 0
    found = audit_log(store, ORIGIN)
    assert names_of(found.problems) == damaged
    assert len(found.entries) == 61
    assert store.bundles <= 1 + len([item for item in store.list(layout.TILES) if "/entries/" in item.name])
