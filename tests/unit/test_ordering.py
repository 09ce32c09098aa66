"""Where slots are claimed, as far as it takes no etcd: what ``ordering=`` means, and claims in a store."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import NotFoundError, StoreError, UsageError
from ciuic_async.format import entry, layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import etcd, ordering
from ciuic_async.transparency.etcd import Etcd
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.ordering import EtcdOrdering, StoreOrdering
from ciuic_async.transparency.post import Answer, post

NAME = layout.slot(7)
ORIGIN = "ciuic.dev/chain/" + "0" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")


class Failing(MemoryStore):
    """Fails as told before or after it does what it is asked."""

    before: StoreError | None = None
    after: StoreError | None = None
    unreadable: Exception | None = None

    def create(self, name: str, data: Buffer) -> None:
        if self.before is not None:
            raise self.before
        super().create(name, data)
        if self.after is not None:
            raise self.after

    def read(self, name: str, limit_bytes: int) -> bytes:
        if self.unreadable is not None:
            raise self.unreadable
        return super().read(name, limit_bytes)


class Unordered(MemoryStore):
    capabilities = Capabilities(orders_writers=False)


@pytest.fixture
def store() -> Failing:
    return Failing()


def add(log: Log, key: SigningKey, text: str) -> int:
    """Append one entry."""
    return log.append(
        lambda _: [entry.NoteEntry(COMMON, text).encode()],
        key,
        announce=lambda: entry.KeyEntry(COMMON, key.vkey(ORIGIN)).encode(),
    )


# --- in a store -------------------------------------------------------------------------------------------------------


def test_a_slot_is_claimed_once(store: Failing) -> None:
    """The first claim wins, others learn what is there, and claiming again what one has is winning."""
    claims = StoreOrdering(store)
    assert claims.read(NAME) is None
    assert claims.claim(NAME, b"ours") == b"ours"
    assert claims.claim(NAME, b"theirs") == b"ours"
    assert claims.claim(NAME, b"ours") == b"ours"
    assert claims.read(NAME) == b"ours"
    claims.settle(NAME, b"ours")


def test_an_error_is_judged_by_what_the_slot_holds(store: Failing) -> None:
    """Ours is there: won. Another's: lost. None: the error itself."""
    claims = StoreOrdering(store)
    store.after = StoreError("the answer is lost")
    assert claims.claim(NAME, b"ours") == b"ours"
    assert claims.claim(NAME, b"other") == b"ours"
    store.before = StoreError("nothing was done", kind="enospc")
    with pytest.raises(StoreError) as caught:
        claims.claim(layout.slot(8), b"x")
    assert caught.value.kind == "enospc"
    assert store.size(layout.slot(8)) is None


def test_a_slot_that_was_not_synced_is_not_won(store: Failing) -> None:
    """A failed fsync is final, whatever can be read back."""
    store.after = StoreError("fsync", kind="fsync_failed")
    with pytest.raises(StoreError) as caught:
        StoreOrdering(store).claim(NAME, b"ours")
    assert caught.value.kind == "fsync_failed"


@pytest.mark.parametrize("error", [NotFoundError("not there yet"), StoreError("gone"), None])
def test_a_slot_that_cannot_be_read_is_lost(store: Failing, error: Exception | None) -> None:
    """Taken by a create that is under way, or holding what is no slot: not ours, and no error."""
    MemoryStore.create(store, NAME, bytes(17 << 20) if error is None else b"x")
    store.unreadable = error
    assert StoreOrdering(store).claim(NAME, b"ours") == b""


# --- in an etcd that is not there -------------------------------------------------------------------------------------


def test_a_chain_is_readable_while_etcd_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """What is in the store is read without asking; what is not is asked for once, then not again for a while."""
    store = MemoryStore()
    claims = EtcdOrdering(store, Etcd(["http://127.0.0.1:1"]), "p", read_timeout_s=0.05)
    store.create(NAME, b"content")
    assert claims.read(NAME) == b"content"
    assert not caplog.records
    assert claims.read(layout.slot(8)) is None
    began_s = time.monotonic()
    for _ in range(100):
        assert claims.read(layout.slot(8)) is None
    assert time.monotonic() - began_s < 0.05 * 100
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_claim_is_made_past_an_etcd_that_is_away() -> None:
    """The claim fails, and the store has no slot."""
    store = MemoryStore()
    claims = EtcdOrdering(store, Etcd(["http://127.0.0.1:1"], timeout_s=0.1), "p")
    with pytest.raises(StoreError) as caught:
        claims.claim(NAME, b"content")
    assert caught.value.kind == "etcd_unavailable"
    assert store.size(NAME) is None


class Answers(Etcd):
    """Answers as told, without a network."""

    def __init__(self, holds: Callable[[bytes], bytes]) -> None:
        super().__init__(["http://127.0.0.1:1"])
        self._holds = holds

    def create(self, key: str, value: bytes) -> bytes:
        return self._holds(value)


def test_an_endless_answer_is_cut_off_at_once() -> None:
    """A peer that sends without end is left as soon as it sent too much, long before the time is over."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def flood() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while True:
                    connection.sendall(bytes(1 << 16))

        peer = threading.Thread(target=flood)
        peer.start()
        began_s = time.monotonic()
        with pytest.raises(StoreError, match="more than 1000000 bytes"):
            post(
                f"http://127.0.0.1:{listening.getsockname()[1]}",
                b"x",
                content_type="text/plain",
                timeout_s=60,
                limit_bytes=1_000_000,
            )
        peer.join()
    assert time.monotonic() - began_s < 30


def test_the_copy_decides_what_was_won(store: Failing) -> None:
    """Won in etcd and not in the store is not won: what the store holds counts, and what cannot be told is an error."""
    wins = EtcdOrdering(store, Answers(lambda value: value), "p")
    MemoryStore.create(store, NAME, b"past etcd")
    assert wins.claim(NAME, b"ours") == b"past etcd"
    store.unreadable = NotFoundError("under way")
    with pytest.raises(StoreError) as caught:
        wins.claim(NAME, b"ours")
    assert caught.value.kind == "slot_not_copied"
    store.before = StoreError("full", kind="enospc")
    for call in (wins.claim, wins.settle):
        with pytest.raises(StoreError) as caught:
            call(layout.slot(8), b"ours")
        assert caught.value.kind == "slot_not_copied"
        assert isinstance(caught.value.__cause__, StoreError)
    loses = EtcdOrdering(store, Answers(lambda value: b"theirs"), "p")
    assert loses.claim(layout.slot(9), b"ours") == b"theirs"
    assert store.size(layout.slot(9)) is None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["header", "kvs", "value", "succeeded", "responses", "response_range", "token"]), inner
        )
    ),
    max_leaves=12,
)


@given(ANY_JSON | st.binary(max_size=60), st.sampled_from([200, 200, 200, 404, 503]))
def test_no_answer_breaks_the_client(content: object, status: int) -> None:
    """Whatever a member answers is understood or a StoreError: a value in bytes, none, or an error."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    for understand in (etcd._created, etcd._first_value):
        try:
            found = understand(etcd._parse(Answer(status, "application/json", body), "http://member"))
        except StoreError:
            continue
        assert found is None or isinstance(found, bytes)


class Hanging(StoreOrdering):
    """A claim that waits until it is told to go on, as one at an etcd that does not answer."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.waiting, self.answer = threading.Event(), threading.Event()

    def claim(self, name: str, content: bytes) -> bytes:
        self.waiting.set()
        assert self.answer.wait(60)
        return super().claim(name, content)


def test_nobody_waits_for_a_claim() -> None:
    """While one thread's claim is on its way others read the log, and other processes write; then it has lost, and its
    next try wins."""
    store = MemoryStore()
    first, second = SigningKey.generate(), SigningKey.generate()
    add(Log(store, ORIGIN), first, "a")
    claims = Hanging(store)
    log = Log(store, ORIGIN, claims)
    found: list[int] = []
    writer = threading.Thread(target=lambda: found.append(add(log, first, "b")))
    writer.start()
    assert claims.waiting.wait(60)
    seen: list[int] = []
    reader = threading.Thread(target=lambda: seen.append(log.refresh().size))
    reader.start()
    reader.join(60)
    assert seen == [2]
    assert add(Log(store, ORIGIN), second, "c") == 3
    assert log.refresh().size == 4
    claims.answer.set()
    writer.join(60)
    assert found == [4]
    log.refresh()
    assert [one.text for _, one in log.entries() if isinstance(one, entry.NoteEntry)] == ["a", "c", "b"]


def test_a_slot_that_a_reader_met_first_counts_once() -> None:
    """The claim has landed and its writer not yet heard of it, when another thread reads the log: one entry."""
    store, key = MemoryStore(), SigningKey.generate()

    class Met(StoreOrdering):
        def claim(self, name: str, content: bytes) -> bytes:
            won = super().claim(name, content)
            reader = threading.Thread(target=log.refresh)
            reader.start()
            reader.join(60)
            assert not reader.is_alive()
            return won

    log = Log(store, ORIGIN, Met(store))
    assert [add(log, key, text) for text in "abc"] == [1, 2, 3]
    assert len(log) == 4


# --- what users say ---------------------------------------------------------------------------------------------------


def test_what_ordering_means() -> None:
    """The three words and the URL; keys of several chains never meet."""
    store = MemoryStore()
    for text in ("local", "object-store"):
        assert isinstance(ordering.parse(text, store, ORIGIN), StoreOrdering)
    found = ordering.parse("etcd://a:1,[::1]:2/team/x/", store, ORIGIN)
    assert isinstance(found, EtcdOrdering)
    assert found._key(NAME) == f"team/x/{ORIGIN}/{NAME}"
    assert repr(found._etcd) == "Etcd(http://a:1, http://[::1]:2)"
    other = ordering.parse("etcd://u:p%40ss@a:1", store, "other")
    assert isinstance(other, EtcdOrdering)
    assert other._key(NAME) == f"ciuic/other/{NAME}"
    assert other._etcd._credentials == {"name": "u", "password": "p@ss"}


@pytest.mark.parametrize("text", ["local", "object-store"])
def test_a_store_that_orders_nobody_has_one_writer(text: str) -> None:
    """Its first writer goes on; a second one, who could overwrite the first one's slots, is told of etcd."""
    store = Unordered()
    claims = ordering.parse(text, store, ORIGIN)
    first, second = SigningKey.generate(), SigningKey.generate()
    assert add(Log(store, ORIGIN, claims), first, "a") == 1
    assert add(Log(store, ORIGIN, claims), first, "b") == 2
    before = [item.name for item in store.list()]
    with pytest.raises(UsageError, match="etcd://") as caught:
        add(Log(store, ORIGIN, claims), second, "c")
    assert caught.value.kind == "one_writer"
    assert [item.name for item in store.list()] == before
    assert add(Log(store, ORIGIN, claims), first, "d") == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "raft",
        "etcd://",
        "etcd:///prefix",
        "etcd://a:1,,b:2",
        "etcd://a:99999",
        "etcd://a b:1",
        "etcd://u:secret@a:99999",
        "etcd://u:secret/x@a:1",
        "etcd://u:?secret@a:1",
        "etcd://[::1:2",
        "http://a:1",
        "etcd://a:1?nonsense",
        "etcd://a:1?cacert=x",
        "etcds://a:1?timeout=3",
        "etcds://a:1?cacert=/no/such/file",
    ],
)
def test_what_ordering_cannot_mean_is_refused(text: str) -> None:
    """A usage error, which repeats no password."""
    with pytest.raises(UsageError) as caught:
        ordering.parse(text, MemoryStore(), ORIGIN)
    assert caught.value.kind == "bad_ordering"
    assert "secret" not in str(caught.value)
