"""The log: one history for all writers, readers that never take a wrong byte, derived files that follow the slots."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ciuic_async.errors import (
    CiuicWarning,
    CommitConflictError,
    IntegrityError,
    NotFoundError,
    StoreError,
    UsageError,
)
from ciuic_async.format import entry, layout, merkle
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import note, proof, slots, tiles
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead

ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")


def line(text: str) -> bytes:
    """An entry that says ``text``."""
    return entry.PruneEntry(COMMON, (), text).encode()


def announcement(key: SigningKey) -> Callable[[], bytes]:
    return lambda: entry.KeyEntry(COMMON, key.vkey(ORIGIN)).encode()


def add(log: Log, key: SigningKey, *texts: str, attempts: int = 100) -> int:
    return log.append(lambda _: [line(text) for text in texts], key, announce=announcement(key), attempts=attempts)


def texts(log: Log) -> list[str]:
    """What the entries that are no keys say."""
    return [item.policy for _, item in log.entries() if isinstance(item, entry.PruneEntry)]


def refreshed_texts(log: Log) -> list[str]:
    log.refresh()
    return texts(log)


class Flaky(MemoryStore):
    """A store of which single operations fail as told: ``fail`` sees the operation and the name, and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: Callable[[str, str], None] = lambda operation, name: None
        self.reads: list[str] = []

    def read(self, name: str, limit_bytes: int) -> bytes:
        self.reads.append(name)
        self.fail("read", name)
        return super().read(name, limit_bytes)

    def create(self, name: str, data: Buffer) -> None:
        self.fail("create", name)
        super().create(name, data)
        self.fail("created", name)

    def overwrite(self, name: str, data: Buffer) -> None:
        self.fail("overwrite", name)
        super().overwrite(name, data)

    def put(self, name: str, data: bytes) -> None:
        """Put bytes under a name past all rules, as damage or an attacker does."""
        MemoryStore.overwrite(self, name, data)

    def files(self) -> dict[str, bytes]:
        return {listed.name: MemoryStore.read(self, listed.name, 1 << 30) for listed in self.list()}


def failing(*operations: tuple[str, str]) -> Callable[[str, str], None]:
    """Fail these (operation, start of name)."""

    def fail(operation: str, name: str) -> None:
        if any(operation == wanted and name.startswith(start) for wanted, start in operations):
            raise StoreError(f"{name}: told to fail", where=name)

    return fail


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def store() -> Flaky:
    return Flaky()


def test_an_empty_log(store: Flaky) -> None:
    """Opening reads nothing; a log without files is empty and has no entry 0."""
    log = Log(store, ORIGIN)
    assert store.reads == []
    assert log.refresh() == LogHead(0, merkle.EMPTY_ROOT)
    assert (len(log), list(log.entries()), log.known_keys()) == (0, [], {})
    with pytest.raises(NotFoundError) as caught:
        log.entry(0)
    assert caught.value.kind == "no_entry"


def test_what_is_appended_is_read_by_everybody(store: Flaky, key: SigningKey) -> None:
    """The key announces itself once; indices are those of the entries; another reader sees the same log."""
    log = Log(store, ORIGIN)
    assert add(log, key, "a") == 1
    assert add(log, key, "b", "c") == 2
    other = Log(store, ORIGIN)
    assert other.refresh() == log.head
    assert len(other) == 4
    assert texts(other) == ["a", "b", "c"]
    assert [index for index, _ in other.reversed_entries()] == [3, 2, 1, 0]
    assert other.entry_bytes(2) == line("b")
    assert other.leaf_hash(2) == merkle.leaf_hash(line("b"))
    assert other.known_keys() == {key.key_id(ORIGIN): key.vkey(ORIGIN)}
    assert other.head_signers == (key.vkey(ORIGIN),)


def test_files_are_those_of_the_specifications(store: Flaky, key: SigningKey) -> None:
    """Head, tile, bundle and slot of a small log are what C2SP and docs/format.md say, taken apart by hand."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    entries = [announcement(key)(), line("a")]
    hashes = [merkle.leaf_hash(data) for data in entries]
    bundle = b"".join(len(data).to_bytes(2, "big") + data for data in entries)
    proposal = key.sign(ORIGIN, note.proposal_text(0, merkle.EMPTY_ROOT, bundle)).encode()
    assert store.files() == {
        "log/checkpoint": key.sign(ORIGIN, note.head_text(ORIGIN, 2, merkle.root(hashes))).encode(),
        "log/tile/0/000.p/2": b"".join(hashes),
        "log/tile/entries/000.p/2": bundle,
        "log/commit/" + "0" * 20: b"ciuic.dev/slot-file/v1 %d %d\n" % (len(proposal), len(bundle)) + proposal + bundle,
    }


def test_nothing_built_is_nothing_written(store: Flaky, key: SigningKey) -> None:
    """A build without entries writes nothing and gives the size; what a build raises passes through."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    before = store.files()
    assert add(log, key) == 2

    def refuse(_: Log) -> Sequence[bytes]:
        raise UsageError("no")

    with pytest.raises(UsageError):
        log.append(refuse, key, announce=announcement(key))
    assert store.files() == before


@pytest.mark.parametrize("data", [b"", b"x", b"{}", b'{"kind":"note"}', b"x" * 65536])
def test_what_is_no_entry_is_not_written(store: Flaky, key: SigningKey, data: bytes) -> None:
    """Bytes that no reader would accept are refused before anything is written."""
    with pytest.raises(UsageError) as caught:
        Log(store, ORIGIN).append(lambda _: [data], key, announce=announcement(key))
    assert caught.value.kind == "bad_entry"
    assert store.files() == {}


def test_an_announcement_of_another_key_is_not_written(store: Flaky, key: SigningKey) -> None:
    """A key entry that does not hold the signing key's vkey would make an unreadable slot: refused."""
    with pytest.raises(UsageError):
        Log(store, ORIGIN).append(lambda _: [line("a")], key, announce=announcement(SigningKey.generate()))
    assert store.files() == {}


def test_a_second_writer_announces_its_own_key_once(store: Flaky, key: SigningKey) -> None:
    """Each writer's key is announced before its first entry, and not again by a new process with that key."""
    second = SigningKey.generate()
    add(Log(store, ORIGIN), key, "a")
    assert add(Log(store, ORIGIN), second, "b") == 3
    assert add(Log(store, ORIGIN), second, "c") == 4
    log = Log(store, ORIGIN)
    log.refresh()
    assert texts(log) == ["a", "b", "c"]
    assert set(log.known_keys().values()) == {key.vkey(ORIGIN), second.vkey(ORIGIN)}


def test_the_newest_entry_of_a_long_log_takes_few_reads(store: Flaky, key: SigningKey) -> None:
    """Opening and reading the newest entry of 1500 takes head, edge, one slot probe and at most three bundles."""
    log = Log(store, ORIGIN)
    for start in range(0, 1500, 300):
        add(log, key, *(str(number) for number in range(start, start + 300)))
    store.reads.clear()
    reader = Log(store, ORIGIN)
    reader.refresh()
    index, newest = next(reader.reversed_entries())
    assert (index, isinstance(newest, entry.PruneEntry) and newest.policy) == (1500, "1499")
    assert len(store.reads) <= 8
    assert texts(reader) == [str(number) for number in range(1500)]


def test_superseded_partial_files_go_and_readers_with_an_old_head_manage(store: Flaky, key: SigningKey) -> None:
    """When a tile is full its partial files are deleted; a reader that still holds an old head reads on."""
    log = Log(store, ORIGIN)
    add(log, key, *map(str, range(200)))
    old_head = store.files()["log/checkpoint"]
    reader = Log(store, ORIGIN)
    reader.refresh()
    add(log, key, *map(str, range(200, 300)))
    names = set(store.files())
    assert {"log/tile/0/000", "log/tile/entries/000", "log/tile/1/000.p/1", "log/tile/0/001.p/45"} <= names
    assert not any(name.startswith(("log/tile/0/000.p", "log/tile/entries/000.p")) for name in names)
    assert texts(reader) == list(map(str, range(200)))
    store.put("log/checkpoint", old_head)
    late = Log(store, ORIGIN)
    assert late.refresh() == log.head
    assert texts(late) == list(map(str, range(300)))


def test_proofs_from_tiles_hold(store: Flaky, key: SigningKey) -> None:
    """Inclusion and consistency proofs made from the log's tiles check against its roots."""
    log = Log(store, ORIGIN)
    roots = {}
    for size in (3, 200, 70, 400):
        add(log, key, *map(str, range(size)))
        roots[len(log)] = log.head.root
    reader = Log(store, ORIGIN)
    reader.refresh()
    for index in (0, 1, 255, 256, 257, 511, len(reader) - 1):
        path = reader.inclusion(index)
        proof.check_inclusion(index, len(reader), reader.leaf_hash(index), path, reader.head.root)
    for size, root in roots.items():
        proof.check_consistency(size, len(reader), root, reader.head.root, reader.consistency(size))


# --- writers that die or fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [("create", "log/tile"), ("created", "log/tile"), ("overwrite", "log/checkpoint"), ("publish", "log/tile")],
)
def test_a_failure_after_the_claim_is_no_error_and_is_made_up_for(
    store: Flaky, key: SigningKey, failure: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Once the slot is won append succeeds; readers see the entry; the next append rolls the derived files forward."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    store.fail = failing(failure)
    if failure[0] == "publish":
        store.fail = failing(("create", "log/tile"), ("read", "log/tile"))
    with caplog.at_level(logging.WARNING, "ciuic_async"):
        assert add(log, key, "b") == 2
    assert "durable in their slot" in caplog.text
    store.fail = failing()
    reader = Log(store, ORIGIN)
    reader.refresh()
    assert texts(reader) == ["a", "b"]
    writer = Log(store, ORIGIN)
    assert add(writer, key, "c") == 3
    pure = MemoryStore()
    for name, data in store.files().items():
        if not name.startswith("log/commit"):
            pure.overwrite(name, data)
    alone = Log(pure, ORIGIN)  # without slots: the derived files alone hold everything
    alone.refresh()
    assert texts(alone) == ["a", "b", "c"]


def test_a_writer_that_died_between_claim_and_tiles_is_rolled_forward(store: Flaky, key: SigningKey) -> None:
    """A slot without tiles, claimed by somebody who is gone, is history; any other key holder publishes it."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    store.put(layout.slot(2), slots.encode_slot(log.head, [line("b"), line("c")], key, ORIGIN))
    second = SigningKey.generate()
    assert add(Log(store, ORIGIN), second, "d") == 5
    names = store.files()
    head = note.parse_head(note.parse(names["log/checkpoint"], "head").text, ORIGIN, "head")
    assert head[0] == 6
    assert {"log/tile/0/000.p/6", "log/tile/entries/000.p/6"} <= set(names)


def test_a_claim_whose_answer_is_lost_counts_once(store: Flaky, key: SigningKey) -> None:
    """The slot was created but the store said it failed: reading it back tells, and the entry is there once."""
    log = Log(store, ORIGIN)
    store.fail = failing(("created", "log/commit"))
    assert add(log, key, "a") == 1
    store.fail = failing()
    assert texts(log) == ["a"]


def test_a_claim_that_failed_is_an_error_and_nothing_is_written(store: Flaky, key: SigningKey) -> None:
    """A store that cannot create the slot raises its own error; the log is as before and goes on later."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    before = store.files()
    store.fail = failing(("create", "log/commit"))
    with pytest.raises(StoreError):
        add(log, key, "b")
    assert store.files() == before
    store.fail = failing()
    assert add(log, key, "b") == 2


def test_a_lost_race_builds_again_and_ends(store: Flaky, key: SigningKey) -> None:
    """Who loses the slot sees the other's entries in its next build; with no attempts left it is a conflict."""
    rival = Log(store, ORIGIN)
    add(rival, key, "first")
    log = Log(store, ORIGIN)
    seen: list[int] = []

    def build(view: Log) -> Sequence[bytes]:
        seen.append(len(view))
        if len(seen) == 1:
            add(rival, key, "rival")
        return [line("mine")]

    assert log.append(build, key, announce=announcement(key)) == 3
    assert seen == [2, 3]
    assert texts(log) == ["first", "rival", "mine"]

    tried: list[int] = []

    def always(view: Log) -> Sequence[bytes]:
        tried.append(len(view))
        add(rival, key, f"rival {len(view)}")
        return [line("never")]

    with pytest.raises(CommitConflictError):
        log.append(always, key, announce=announcement(key), attempts=3)
    assert tried == [4, 5, 6]
    log.refresh()
    assert "never" not in texts(log)


def test_a_slow_writer_that_puts_the_head_back_does_no_harm(store: Flaky, key: SigningKey) -> None:
    """An older head is consistent: views stay, new readers find the slots, the next append writes the head again."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    old = store.files()["log/checkpoint"]
    add(log, key, "b")
    store.put("log/checkpoint", old)
    assert log.refresh().size == 3
    assert Log(store, ORIGIN).refresh() == log.head
    add(log, key, "c")
    text = note.parse(store.files()["log/checkpoint"], "head").text
    assert note.parse_head(text, ORIGIN, "head")[0] == 4


# --- damage -----------------------------------------------------------------------------------------------------------


def big_log(store: Flaky, key: SigningKey) -> list[str]:
    """A log of 600 lines in three slots: full and partial tiles on two levels."""
    log = Log(store, ORIGIN)
    for start in range(0, 600, 200):
        add(log, key, *map(str, range(start, start + 200)))
    return list(map(str, range(600)))


def test_every_derived_file_may_be_damaged_or_missing(store: Flaky, key: SigningKey) -> None:
    """For each derived file of a head: flipped, cut, too long, empty or gone, a reader gives the right entries and one
    warning, and publishing makes the file again.
    """
    expected = big_log(store, key)
    good = store.files()
    needed = list(tiles.grown(0, 601))
    derived = ["log/checkpoint", *(tile.name for tile in needed)]
    derived += [layout.entry_bundle(tile.index, tile.width) for tile in needed if tile.level == 0]
    assert len(derived) == 8
    for name in derived:
        data = good[name]
        for bad in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"x", b"", None):
            store.delete(name)
            if bad is not None:
                store.put(name, bad)
            reader = Log(store, ORIGIN)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                reader.refresh()
                assert texts(reader) == expected
                assert len(caught) == 1
                assert caught[0].category is CiuicWarning
                reader.publish_derived(key)
            assert store.files() == good, name


def test_damaged_slots_do_not_matter_to_readers_until_they_are_needed(store: Flaky, key: SigningKey) -> None:
    """With a damaged slot the tiles serve; with a damaged tile too it is an IntegrityError, never other entries."""
    expected = big_log(store, key)
    good = store.files()
    slot = good[layout.slot(201)]
    store.put(layout.slot(201), slot[:-1] + b"x")
    reader = Log(store, ORIGIN)
    reader.refresh()
    assert texts(reader) == expected
    for name in ("log/checkpoint", "log/tile/0/002.p/89", "log/tile/entries/000"):
        store.put(name, good[name][:-2] + b"x\n")
        reader = Log(store, ORIGIN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CiuicWarning)
            with pytest.raises(IntegrityError):
                refreshed_texts(reader)
        store.put(name, good[name])


def test_a_signed_head_beyond_the_slots_is_an_error(store: Flaky, key: SigningKey) -> None:
    """When a slot is gone and tiles are damaged the log is not silently shorter."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    add(log, key, "b")
    store.delete(layout.slot(2))
    store.delete("log/tile/0/000.p/3")
    reader = Log(store, ORIGIN)
    with pytest.warns(CiuicWarning), pytest.raises(IntegrityError) as caught:
        reader.refresh()
    assert caught.value.kind == "slots_missing"


def test_two_signed_histories_are_a_fork(store: Flaky, key: SigningKey) -> None:
    """A reader that has seen one history refuses another one by the same key, shorter, longer or as long."""
    for lengths in ((2, 1), (1, 2), (2, 2)):
        stores = [Flaky(), Flaky()]
        logs = [Log(one, ORIGIN) for one in stores]
        for log, length, name in zip(logs, lengths, "xy", strict=True):
            add(log, key, "same")
            for number in range(length):
                add(log, key, f"{name}{number}")
        reader = logs[0]
        for name, data in stores[1].files().items():
            stores[0].put(name, data)
        with pytest.raises(IntegrityError) as caught:
            reader.refresh()
        assert caught.value.kind in ("fork", "slot_mismatch")


def test_forged_and_replayed_slots_are_refused(store: Flaky, key: SigningKey) -> None:
    """A slot by a key that nobody announced, an old slot under a new name, a slot for another root, one with other
    entries than signed, one without entries or of another log: each is an IntegrityError, for readers and writers.
    """
    log = Log(store, ORIGIN)
    add(log, key, "a")
    head = log.head
    stranger = SigningKey.generate()
    good = slots.encode_slot(head, [line("b")], key, ORIGIN)
    other_origin = slots.encode_slot(head, [line("b")], key, "ciuic.dev/chain/other")
    attempts = {
        "signer_unknown": slots.encode_slot(head, [line("b")], stranger, ORIGIN),
        "slot_mismatch": store.files()[layout.slot(0)],
        "slot_malformed": other_origin,
    }
    attempts_more = [
        slots.encode_slot(LogHead(head.size, bytes(32)), [line("b")], key, ORIGIN),
        good.replace(line("b"), line("c")),
        slots.encode_slot(head, [], key, ORIGIN),
        good + b"x",
        good.replace(b"v1 ", b"v1 0", 1),
        b"",
    ]
    for expected, data in [*attempts.items(), *((None, data) for data in attempts_more)]:
        store.put(layout.slot(2), data)
        for use in (Log(store, ORIGIN).refresh, lambda: add(Log(store, ORIGIN), key, "d")):
            with pytest.raises(IntegrityError) as caught:
                use()
            assert expected in (None, caught.value.kind)
            assert caught.value.where == layout.slot(2)
    store.put(layout.slot(2), good)
    assert Log(store, ORIGIN).refresh().size == 3


def test_a_head_by_a_stranger_is_passed_over_and_repaired(store: Flaky, key: SigningKey) -> None:
    """A head that no key of the log signed is not believed, however consistent it is; the next writer replaces it."""
    log = Log(store, ORIGIN)
    add(log, key, "a")
    good = store.files()["log/checkpoint"]
    store.put("log/checkpoint", SigningKey.generate().sign(ORIGIN, note.head_text(ORIGIN, 2, log.head.root)).encode())
    reader = Log(store, ORIGIN)
    with pytest.warns(CiuicWarning):
        assert reader.refresh() == log.head
    assert reader.head_signers == ()
    reader.publish_derived(key)
    assert store.files()["log/checkpoint"] == good


def test_repair_makes_everything_again(store: Flaky, key: SigningKey) -> None:
    """repair replaces every damaged derived file from the slots, superseded partial ones included."""
    log = Log(store, ORIGIN)
    for number in range(4):
        add(log, key, str(number))
    good = store.files()
    for name in good:
        if not name.startswith("log/commit"):
            store.put(name, b"garbage")
    Log(store, ORIGIN).repair(key)
    assert store.files() == good


# --- races ------------------------------------------------------------------------------------------------------------


def test_threads_append_each_entry_exactly_once(key: SigningKey) -> None:
    """Two threads on one Log and two on their own append 15 entries each: all are there once, at their index."""
    store = MemoryStore()
    shared = Log(store, ORIGIN)
    logs = [shared, shared, Log(store, ORIGIN), Log(store, ORIGIN)]
    acknowledged: dict[str, int] = {}

    def work(number: int) -> None:
        for turn in range(15):
            text = f"{number}-{turn}"
            acknowledged[text] = add(logs[number], key, text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = Log(store, ORIGIN)
    reader.refresh()
    found = {item.policy: index for index, item in reader.entries() if isinstance(item, entry.PruneEntry)}
    assert found == acknowledged
    assert len(reader) == 61


WRITER = """
import sys
from ciuic_async.stores.local import LocalStore
from ciuic_async.format import entry
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
folder, name, origin = sys.argv[1:]
key = SigningKey.generate()
common = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")
log = Log(LocalStore(folder), origin)
announce = lambda: entry.KeyEntry(common, key.vkey(origin)).encode()
sys.stdin.read(1)
for turn in range(12):
    data = entry.PruneEntry(common, (), f"{name}-{turn}").encode()
    print(log.append(lambda _: [data], key, announce=announce), f"{name}-{turn}", flush=True)
"""


def test_processes_append_each_entry_exactly_once(tmp_path: Path) -> None:
    """Two processes with their own keys race for one folder: every acknowledged entry is at its index, once."""
    store = LocalStore(tmp_path)
    store.initialize()
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path), name, ORIGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    acknowledged = {}
    for process in started:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.close()
    for process in started:
        assert process.stdout is not None
        with process.stdout:
            for answer in process.stdout:
                index, text = answer.split()
                acknowledged[text] = int(index)
        assert process.wait() == 0
    log = Log(store, ORIGIN)
    log.refresh()
    found = {item.policy: index for index, item in log.entries() if isinstance(item, entry.PruneEntry)}
    assert found == acknowledged
    assert len(log) == 26
    assert len(log.known_keys()) == 2


def test_an_append_touches_few_files_however_long_the_log(key: SigningKey) -> None:
    """A log of 300 entries costs an append as little as a new one: a slot, a tile, a bundle, a head, a few reads."""
    store = Flaky()
    log = Log(store, ORIGIN)
    add(log, key, *map(str, range(300)))
    operations: list[str] = []
    store.fail = lambda operation, name: operations.append(operation)
    add(log, key, "one more")
    assert len(operations) <= 16


def test_bundles_hold_the_entries_up_to_the_limit(store: Flaky, key: SigningKey) -> None:
    """Entries of the largest size go through; more than a slot holds is a UsageError before anything is written."""
    log = Log(store, ORIGIN)
    long = line("x" * (entry.LIMIT_BYTES - len(line(""))))
    assert len(long) == tiles.MAX_ENTRY_BYTES
    log.append(lambda _: [long], key, announce=announcement(key))
    assert log.entry_bytes(1) == long
    before = store.files()
    with pytest.raises(UsageError) as caught:
        log.append(lambda _: [long] * 257, key, announce=announcement(key))
    assert caught.value.kind == "slot_too_large"
    assert store.files() == before


def test_writers_that_die_again_and_again_before_their_log_head_leave_no_false_alarm() -> None:
    """Each writer first rolls its predecessor forward: never are two slots without a log head, and nothing is lost."""
    store, key = Flaky(), SigningKey.generate()

    def die_at_the_head(operation: str, name: str) -> None:
        if (operation, name) == ("overwrite", layout.LOG_HEAD):
            raise KeyboardInterrupt

    store.fail = die_at_the_head
    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            add(Log(store, ORIGIN), key, str(number))
        assert not audit_log(store, ORIGIN).problems
    store.fail = lambda operation, name: None
    add(Log(store, ORIGIN), key, "last")
    assert refreshed_texts(Log(store, ORIGIN)) == ["0", "last"]
    assert not audit_log(store, ORIGIN).problems


def test_first_writers_that_all_die_before_their_log_head_leave_no_false_alarm() -> None:
    """Each has a new key, so none can sign a head for those before it: no head is there, and none is missed.

    Once a writer whose key is known went on, a head was there: one that is gone then is missed.
    """
    store, keys = Flaky(), [SigningKey.generate() for _ in range(3)]
    store.fail = failing(("overwrite", layout.LOG_HEAD))
    for number, key in enumerate(keys):
        add(Log(store, ORIGIN), key, str(number))
        assert Log(store, ORIGIN).refresh().size == 2 * number + 2
        assert not audit_log(store, ORIGIN).problems
    store.fail = failing()
    add(Log(store, ORIGIN), keys[0], "last")
    assert refreshed_texts(Log(store, ORIGIN)) == ["0", "1", "2", "last"]
    store.delete(layout.LOG_HEAD)
    assert [problem.kind for problem in audit_log(store, ORIGIN).problems] == ["missing"]
    with pytest.warns(CiuicWarning, match="log head is missing"):
        Log(store, ORIGIN).refresh()
