"""The log where derived files are found damaged late, claims end oddly, and slots were replaced: rare, never silent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ciuic_async.errors import CiuicWarning, IntegrityError, StoreError
from ciuic_async.format import entry, layout, merkle
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import slots, view
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead

ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")
KEY = SigningKey.generate()


class Troubled(MemoryStore):
    """A store of which operations go wrong as told: ``trouble`` sees the operation and the name, and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: Callable[[str, str], None] = lambda operation, name: None

    def read(self, name: str, limit_bytes: int) -> bytes:
        self.trouble("read", name)
        return super().read(name, limit_bytes)

    def create(self, name: str, data: Buffer) -> None:
        self.trouble("create", name)
        super().create(name, data)

    def put(self, name: str, data: bytes) -> None:
        """Put bytes under a name past all rules, as damage or an attacker does."""
        MemoryStore.overwrite(self, name, data)

    def flip(self, name: str) -> None:
        data = MemoryStore.read(self, name, 1 << 30)
        self.put(name, bytes([data[0] ^ 1]) + data[1:])


def line(text: str) -> bytes:
    return entry.PruneEntry(COMMON, (), text).encode()


def add(store: MemoryStore, *texts: str, key: SigningKey = KEY) -> Log:
    """A writer that knows nothing of before appends what the texts say."""
    log = Log(store, ORIGIN)
    announced = entry.KeyEntry(COMMON, key.vkey(ORIGIN)).encode()
    log.append(lambda _: [line(text) for text in texts], key, announce=lambda: announced)
    return log


def texts(log: Log) -> list[str]:
    log.refresh()
    return [item.policy for _, item in log.entries() if isinstance(item, entry.PruneEntry)]


def numbers(count: int, start: int = 0) -> list[str]:
    return [str(number) for number in range(start, start + count)]


# --- damage that shows late -------------------------------------------------------------------------------------------


def test_a_bundle_found_damaged_while_publishing_is_repaired_at_once() -> None:
    """The writer's own entry is durable, and afterwards every derived file is right again."""
    store = Troubled()
    add(store, *numbers(299))
    store.flip("log/tile/entries/001.p/44")
    with pytest.warns(CiuicWarning, match="entries/001"):
        add(store, "last")
    assert audit_log(store, ORIGIN).problems == []
    assert texts(Log(store, ORIGIN)) == [*numbers(299), "last"]


def test_a_bundle_that_announces_the_next_signer_may_be_damaged() -> None:
    """A reader that looks for the key of a new slot in a damaged bundle takes it from the slots, with a warning."""
    store, other = Troubled(), SigningKey.generate()
    add(store, *numbers(299))
    add(store, "mine", key=other)
    log = add(store, "yours")  # the head is signed by the first key again
    store.create(layout.slot(len(log)), slots.encode_slot(log.head, [line("late")], other, ORIGIN))
    store.flip("log/tile/entries/001.p/47")
    reader = Log(store, ORIGIN)
    with pytest.warns(CiuicWarning, match="entries/001"):
        reader.refresh()
    assert texts(reader) == [*numbers(299), "mine", "yours", "late"]


def test_damage_that_slots_cannot_mend_names_what_is_missing() -> None:
    """A bundle is damaged and a slot is gone: an error that names both, and what was verified stays so."""
    store = Troubled()
    add(store, *numbers(299))
    add(store, "last")
    reader = Log(store, ORIGIN)
    head = reader.refresh()
    store.flip("log/tile/entries/001.p/45")
    store.delete(layout.slot(300))
    with pytest.raises(IntegrityError, match="entries/001") as caught:
        reader.entry(280)
    assert (caught.value.kind, caught.value.where) == ("slots_missing", layout.slot(300))
    assert reader.head == head
    assert isinstance(reader.entry(0), entry.KeyEntry)


def test_slots_of_another_history_mend_nothing() -> None:
    """Where a derived file is damaged and the slots tell another story than the one seen before, that is a fork."""
    store = Troubled()
    add(store, *numbers(299))
    reader = Log(store, ORIGIN)
    reader.refresh()
    announced = entry.KeyEntry(COMMON, KEY.vkey(ORIGIN)).encode()
    forged = [announced, *map(line, numbers(298)), line("forged")]
    store.put(layout.slot(0), slots.encode_slot(LogHead(0, merkle.EMPTY_ROOT), forged, KEY, ORIGIN))
    store.flip("log/tile/entries/001.p/44")
    with pytest.raises(IntegrityError) as caught:
        reader.entry(299)
    assert caught.value.kind == "fork"


def test_the_right_edge_may_be_empty() -> None:
    """At exactly 256 entries no tile is partial: such a log is read, extended, damaged and repaired like any other."""
    store = Troubled()
    add(store, *numbers(255))
    assert len(Log(store, ORIGIN)) == 0
    reader = Log(store, ORIGIN)
    assert texts(reader) == numbers(255)
    assert reader.head.size == 256
    store.flip("log/tile/0/000")
    with pytest.warns(CiuicWarning, match="tile/0/000"):
        assert texts(Log(store, ORIGIN)) == numbers(255)
    Log(store, ORIGIN).repair(KEY)
    assert audit_log(store, ORIGIN).problems == []
    add(store, "more")
    assert texts(Log(store, ORIGIN)) == [*numbers(255), "more"]


def test_tiles_in_memory_are_bounded_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tiles a reader looks at, few stay in memory; what went is read and checked again."""
    monkeypatch.setattr(view, "_TILES_KEPT", 1)
    store = Troubled()
    for start in range(0, 900, 300):
        add(store, *numbers(300, start))
    log = Log(store, ORIGIN)
    log.refresh()
    hashes = [merkle.leaf_hash(log.entry_bytes(index)) for index in range(len(log))]
    for index in (0, 300, 600, 0, 900):
        assert log.leaf_hash(index) == hashes[index]
        assert len(log._view._tiles) <= 1


def test_what_is_no_partial_tile_is_left_alone() -> None:
    """A writer that drops superseded partial files deletes no file of another name beside them."""
    store = Troubled()
    add(store, *numbers(199))
    store.put("log/tile/0/000.p/stranger", b"not ours")
    add(store, *numbers(200, 199))
    assert store.size("log/tile/0/000.p/200") is None
    assert store.read("log/tile/0/000.p/stranger", 100) == b"not ours"


# --- claims that end oddly --------------------------------------------------------------------------------------------


def test_a_claim_whose_fsync_failed_is_no_claim() -> None:
    """The slot is there and reads back, but may not outlast a loss of power: an error, whatever is read."""
    store = Troubled()
    add(store, "first")
    name = layout.slot(2)

    def trouble(operation: str, about: str) -> None:
        if (operation, about) == ("create", name):
            store.put(name, content[0])
            raise StoreError(f"{name}: fsync failed", kind="fsync_failed", where=name)

    log = Log(store, ORIGIN)
    content = [slots.encode_slot(log.refresh(), [line("second")], KEY, ORIGIN)]
    store.trouble = trouble
    with pytest.raises(StoreError) as caught:
        add(store, "second")
    assert caught.value.kind == "fsync_failed"


@pytest.mark.parametrize(
    "unreadable", [StoreError("not now", kind="eio"), IntegrityError("a link", kind="symbolic_link")]
)
def test_a_lost_race_whose_winner_cannot_be_read_is_a_lost_race(unreadable: Exception) -> None:
    """Another writer's slot that cannot be read yet is not ours: the entry is written once, after that writer's."""
    store = Troubled()
    log = add(store, "first")
    theirs = slots.encode_slot(log.head, [line("theirs")], KEY, ORIGIN)
    name = layout.slot(2)
    done: list[str] = []

    def trouble(operation: str, about: str) -> None:
        if about == name and operation == "create" and not done:
            done.append("claimed")
            store.put(name, theirs)
        elif about == name and operation == "read" and done == ["claimed"]:
            done.append("read")
            raise unreadable

    store.trouble = trouble
    add(store, "ours")
    assert done == ["claimed", "read"]
    assert texts(Log(store, ORIGIN)) == ["first", "theirs", "ours"]


def test_a_claim_that_failed_and_cannot_be_read_back_is_an_error() -> None:
    """Nobody knows whether the slot was made: the error is that of the claim, not of the look at it."""
    store = Troubled()
    add(store, "first")
    seen: list[str] = []

    def trouble(operation: str, about: str) -> None:
        if about == layout.slot(2) and (operation == "create" or seen):
            seen.append(operation)
            raise StoreError(f"{about}: {operation} failed", kind=f"{operation}_failed", where=about)

    store.trouble = trouble
    with pytest.raises(StoreError) as caught:
        add(store, "second")
    assert (caught.value.kind, seen) == ("create_failed", ["create", "read"])
