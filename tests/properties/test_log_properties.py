"""The log against a plain model: whatever is appended, crashed, damaged or lost, readers give the model's entries."""

from __future__ import annotations

import warnings

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciuic_async.errors import CiuicWarning, FormatVersionError, IntegrityError
from ciuic_async.format import entry, layout, merkle
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import note, slots, tiles
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log

ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")
KEYS = [SigningKey.generate() for _ in range(3)]


def line(text: str) -> bytes:
    return entry.PruneEntry(COMMON, (), text).encode()


def announcement(key: SigningKey) -> bytes:
    return entry.KeyEntry(COMMON, key.vkey(ORIGIN)).encode()


def append(log: Log, key: SigningKey, entries: list[bytes]) -> int:
    return log.append(lambda _: entries, key, announce=lambda: announcement(key))


def expected_files(model: list[bytes]) -> dict[str, bytes]:
    """The tiles and bundles of a log, computed the plain way."""
    files = {}
    hashes = [merkle.leaf_hash(data) for data in model]
    level = 0
    while hashes:
        for start in range(0, len(hashes), 256):
            part = hashes[start : start + 256]
            files[layout.tile(level, start // 256, len(part))] = b"".join(part)
            if level == 0:
                bundle = b"".join(len(data).to_bytes(2, "big") + data for data in model[start : start + 256])
                files[layout.entry_bundle(start // 256, len(part))] = bundle
        hashes = [merkle.root(hashes[start : start + 256]) for start in range(0, len(hashes) - 255, 256)]
        level += 1
    return files


appends = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(st.integers(1, 5), st.integers(240, 270)), st.booleans()),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(appends)
def test_any_appends_equal_the_plain_model(plan: list[tuple[int, int, bool]]) -> None:
    """Appends by three writers, of one to hundreds of entries, some by new processes, some crashed after the claim:
    the files are the plainly computed ones, all readers agree with the model, and the audit finds nothing.
    """
    store = MemoryStore()
    logs = [Log(store, ORIGIN) for _ in KEYS]
    follower = Log(store, ORIGIN)
    model: list[bytes] = []
    announced: set[int] = set()
    for number, (writer, count, crashed) in enumerate(plan):
        entries = [line(f"{number}-{index}") for index in range(count)]
        if crashed and writer in announced:
            head = follower.refresh()
            store.create(layout.slot(head.size), slots.encode_slot(head, entries, KEYS[writer], ORIGIN))
        else:
            log = logs[writer] if count % 2 else Log(store, ORIGIN)
            if writer not in announced:
                model.append(announcement(KEYS[writer]))
                announced.add(writer)
            assert append(log, KEYS[writer], entries) == len(model)
        model += entries
        if number % 2:
            assert follower.refresh().root == merkle.root(map(merkle.leaf_hash, model))
    model.append(line("last"))
    append(logs[plan[0][0]], KEYS[plan[0][0]], model[-1:])
    follower.refresh()
    for reader in (follower, Log(store, ORIGIN), logs[0]):
        assert reader.refresh().root == merkle.root(map(merkle.leaf_hash, model))
        assert [reader.entry_bytes(index) for index in range(len(reader))] == model
        assert [index for index, _ in reader.reversed_entries()] == list(reversed(range(len(model))))
        assert set(reader.known_keys()) == {KEYS[writer].key_id(ORIGIN) for writer in announced}
    for name, data in expected_files(model).items():
        assert store.read(name, 1 << 30) == data
    text = note.parse(store.read("log/checkpoint", 1 << 20), "head").text
    assert note.parse_head(text, ORIGIN, "head") == (len(model), follower.head.root)
    assert audit_log(store, ORIGIN).problems == []


def small_log() -> tuple[MemoryStore, list[bytes]]:
    """Five entries in three slots, the last of which is not yet in tiles."""
    store = MemoryStore()
    log = Log(store, ORIGIN)
    append(log, KEYS[0], [line("a")])
    append(log, KEYS[0], [line("b"), line("c")])
    store.create(layout.slot(4), slots.encode_slot(log.head, [line("d")], KEYS[0], ORIGIN))
    return store, [announcement(KEYS[0]), *(line(text) for text in "abcd")]


def test_no_bit_flip_makes_a_reader_give_wrong_entries() -> None:
    """For every bit of every file: a reader raises or gives exactly the right entries."""
    store = MemoryStore()
    log = Log(store, ORIGIN)
    append(log, KEYS[0], [line("a")])
    store.create(layout.slot(2), slots.encode_slot(log.head, [line("b")], KEYS[0], ORIGIN))
    model = [announcement(KEYS[0]), line("a"), line("b")]
    outcomes = set()
    for listed in list(store.list()):
        data = store.read(listed.name, 1 << 20)
        for bit in range(len(data) * 8):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << (bit % 8)
            store.overwrite(listed.name, bytes(changed))
            reader = Log(store, ORIGIN)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CiuicWarning)
                try:
                    reader.refresh()
                    found = [reader.entry_bytes(index) for index in range(len(reader))]
                except (IntegrityError, FormatVersionError):
                    outcomes.add("refused")
                else:
                    assert found == model
                    outcomes.add("right")
        store.overwrite(listed.name, data)
    assert outcomes == {"refused", "right"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_several_damages_never_give_wrong_entries_and_writers_heal(data: st.DataObject) -> None:
    """With any files removed, cut or swapped, a reader raises or gives a prefix of the truth that covers every good
    head; if slots are whole it gives everything, and after an append and a repair the audit finds nothing.
    """
    store, model = small_log()
    names = [listed.name for listed in store.list()]
    content = {name: store.read(name, 1 << 20) for name in names}
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    for name in chosen:
        how = data.draw(st.sampled_from(["remove", "cut", "swap", "grow"]))
        store.delete(name)
        if how == "cut":
            store.create(name, content[name][: data.draw(st.integers(0, len(content[name]) - 1))])
        elif how == "swap":
            store.create(name, content[data.draw(st.sampled_from([other for other in names if other != name]))])
        elif how == "grow":
            store.create(name, content[name] + data.draw(st.binary(min_size=1, max_size=40)))
    reader = Log(store, ORIGIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CiuicWarning)
        try:
            reader.refresh()
            found = [reader.entry_bytes(index) for index in range(len(reader))]
        except IntegrityError:
            assert any(name.startswith(layout.SLOTS) for name in chosen)
            return
        assert found == model[: len(found)]
        if any(name.startswith(layout.SLOTS) for name in chosen):
            return
        assert found == model
        assert append(reader, KEYS[0], [line("e")]) == 5
        reader.repair(KEYS[0])
    assert audit_log(store, ORIGIN).problems == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_every_parser(data: bytes) -> None:
    """Parsers of notes, slots, bundles and keys answer any bytes with a value or an IntegrityError."""
    head = Log(MemoryStore(), ORIGIN).head
    refused = 0
    for prefix in (b"", b"ciuic.dev/slot-file/v1 10 20\n", b"text\n\n\xe2\x80\x94 a "):
        for parse in (
            lambda raw: note.parse(raw, "x"),
            lambda raw: slots.check_slot(raw, head, ORIGIN, lambda _: None),
            lambda raw: tiles.decode_bundle(raw, None, "x"),
            lambda raw: note.parse_vkey(raw.decode("utf-8", "surrogatepass" if len(raw) % 2 else "replace")),
        ):
            try:
                parse(prefix + data)
            except (IntegrityError, FormatVersionError):
                refused += 1
            except UnicodeDecodeError:  # the test's own decoding, not the parser's
                refused += 1
    assert refused > 0
