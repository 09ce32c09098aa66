"""SegmentWriter: what becomes a file, what happens when it cannot, and that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import InternalError, StoreError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.segment import RecordHeader
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import WriteOptions
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.segments.whole import check_segment
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore

SNAPSHOT = "0123456789abcdef0123"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = LocalStore(tmp_path / "chain") if request.param == "local" else MemoryStore()
    store.initialize()
    return store


def _chunk(raw: bytes | bytearray) -> EncodedChunk:
    return RawCodec().encode(memoryview(raw), digest(raw), 1)


def test_locations_lead_back_to_every_chunk(store: Store) -> None:
    """After publishing, each digest's location reads as its bytes; the sizes add up."""
    contents = [os.urandom(size) for size in (0, 1, 63, 64, 5000, (1 << 20) + 3)]
    writer = SegmentWriter(store, SNAPSHOT)
    for raw in contents:
        writer.append(_chunk(raw))
    finished = writer.finish()
    store.publish(finished.files)
    assert finished.size_bytes == store.size(layout.segment(SNAPSHOT, 0, 0))
    assert finished.next_number == 1
    reader = chunk_reader(store)
    for raw in contents:
        assert reader.read_chunk(digest(raw), len(raw), finished.locations[digest(raw)]) == raw


def test_buffers_may_be_reused_after_append(store: Store) -> None:
    """The payload is copied or written when append returns."""
    writer = SegmentWriter(store, SNAPSHOT)
    buffer = bytearray(b"a" * 10_000)
    writer.append(_chunk(buffer))
    buffer[:] = b"b" * 10_000
    finished = writer.finish()
    store.publish(finished.files)
    (location,) = finished.locations.values()
    assert chunk_reader(store).read_chunk(digest(b"a" * 10_000), 10_000, location) == b"a" * 10_000


def test_segments_roll_at_their_size(store: Store) -> None:
    """A record that does not fit opens the next segment; one larger than a segment gets one to itself."""
    writer = SegmentWriter(
        store, SNAPSHOT, 2, first_number=7, options=WriteOptions(segment_size_bytes=8192, buffer_size_bytes=4096)
    )
    contents = [bytes([number]) * size for number, size in enumerate([3000, 3000, 3000, 20_000, 10])]
    for raw in contents:
        writer.append(_chunk(raw))
    finished = writer.finish()
    store.publish(finished.files)
    names = [finished.locations[digest(raw)].segment.path for raw in contents]
    assert names == [layout.segment(SNAPSHOT, 2, number) for number in (7, 7, 8, 9, 10)]
    assert finished.next_number == 11
    assert [file.name for file in finished.files] == list(dict.fromkeys(names))
    for reference in {location.segment for location in finished.locations.values()}:
        check_segment(store, reference)


def test_large_raw_payloads_are_aligned_for_direct_reads(store: Store) -> None:
    """From 1 MiB on a raw payload starts at a multiple of 4096, and the file's length is one."""
    writer = SegmentWriter(store, SNAPSHOT)
    for size in (100, 1 << 20, 7, (1 << 20) + 1):
        writer.append(_chunk(os.urandom(size)))
    finished = writer.finish()
    store.publish(finished.files)
    assert finished.size_bytes % 4096 == 0
    (reference,) = {location.segment for location in finished.locations.values()}
    for entry in check_segment(store, reference):
        payload = entry.offset_bytes + entry.record_size_bytes - entry.raw_size_bytes
        assert payload % (4096 if entry.raw_size_bytes >= 1 << 20 else 64) == 0


def test_nothing_appended_means_no_file(store: Store) -> None:
    """A snapshot without new chunks has no segment."""
    finished = SegmentWriter(store, SNAPSHOT, first_number=4).finish()
    assert finished.files == ()
    assert finished.locations == {}
    assert (finished.size_bytes, finished.next_number) == (0, 4)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("when", ["before", "during", "after finish", "dropped"])
def test_abort_leaves_nothing(tmp_path: Path, when: str) -> None:
    """Aborted at any time, twice, or just dropped: no file, no descriptor, no thread is left."""
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    writer = SegmentWriter(store, SNAPSHOT, options=WriteOptions(segment_size_bytes=4096))
    if when != "before":
        for number in range(3):
            writer.append(_chunk(bytes([number]) * 5000))
    finished = writer.finish() if when == "after finish" else None
    if when != "dropped":
        writer.abort()
        writer.abort()
    del writer, finished
    assert list((tmp_path / "chain" / "tmp").iterdir()) == []
    assert list((tmp_path / "chain" / "segments").iterdir()) == []
    store.close()


def test_abort_after_publish_changes_nothing(store: Store) -> None:
    """What is published stays."""
    writer = SegmentWriter(store, SNAPSHOT)
    writer.append(_chunk(b"content"))
    finished = writer.finish()
    store.publish(finished.files)
    writer.abort()
    (location,) = finished.locations.values()
    assert chunk_reader(store).read_chunk(digest(b"content"), 7, location) == b"content"


def test_used_after_its_end_is_our_mistake(store: Store) -> None:
    """append and finish after finish or abort are InternalErrors."""
    writer = SegmentWriter(store, SNAPSHOT)
    writer.finish()
    for call in (lambda: writer.append(_chunk(b"x")), writer.finish):
        with pytest.raises(InternalError) as caught:
            call()
        assert caught.value.kind == "not_open"


def test_payload_of_another_length_is_refused_before_it_is_written(store: Store) -> None:
    """A header that lies about its payload never reaches a file."""
    writer = SegmentWriter(store, SNAPSHOT)
    header = RecordHeader(segment.CODEC_RAW, 10, 10, digest(b"x" * 10))
    with pytest.raises(InternalError, match="payload of 9 bytes"):
        writer.append(EncodedChunk(header, (b"x" * 9,)))
    writer.append(_chunk(b"y"))
    assert len(writer.finish().locations) == 1
    writer.abort()


def test_interrupted_append_fails_for_good(store: Store) -> None:
    """Half a record is in the file: later calls refuse instead of pretending."""
    writer = SegmentWriter(store, SNAPSHOT)
    strided = memoryview(b"a-b-c-")[::2]  # as long as the header says, but no run of bytes
    with pytest.raises((BufferError, TypeError)):
        writer.append(EncodedChunk(_chunk(b"abc").header, (strided,)))
    for call in (lambda: writer.append(_chunk(b"x")), writer.finish):
        with pytest.raises(InternalError) as caught:
            call()
        assert caught.value.kind == "interrupted"
    writer.abort()


_LIMITED = """
import resource, sys
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import StoreError
from ciuic_async.format.digest import digest
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.local import LocalStore
store = LocalStore(sys.argv[1])
store.initialize()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
writer = SegmentWriter(store, "0123456789abcdef0123")
for attempt in range(2):
    try:
        for number in range(600):
            raw = bytes([number % 251]) * 65536
            writer.append(RawCodec().encode(memoryview(raw), digest(raw), 1))
        writer.finish()
    except StoreError as error:
        print(error.kind, error.where, "ulimit" in str(error))
writer.abort()
"""


@pytest.mark.parametrize("core", ["0", "1"])
def test_write_error_is_a_store_error_that_stays(tmp_path: Path, core: str) -> None:
    """What the system says becomes a StoreError with its name, place and advice, each time; abort cleans up."""
    process = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "chain")],
        env=os.environ | {"CIUIC_ASYNC_NATIVE": core},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.splitlines() == [f"efbig {layout.segment(SNAPSHOT, 0, 0)} True"] * 2
    assert list((tmp_path / "chain" / "tmp").iterdir()) == []


class _FullDevice:
    """An unpublished file on a device that is always full: the system's own /dev/full."""

    name = layout.segment(SNAPSHOT, 0, 0)

    def __init__(self) -> None:
        self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  closed by discard, as the contract says

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise StoreError("/dev/full: the disk is full", kind="enospc", where=self.name) from error

    def filled(self) -> None:
        pass

    def fileno(self) -> int:
        return self._file.fileno()

    def discard(self) -> None:
        self._file.close()


class _FullStore(LocalStore):
    def begin(self, name: str) -> _FullDevice:
        return _FullDevice()


@pytest.mark.usefixtures("no_leaks")
def test_full_disk_says_so(tmp_path: Path) -> None:
    """ENOSPC arrives as StoreError kind enospc with what to do."""
    writer = SegmentWriter(_FullStore(tmp_path), SNAPSHOT)

    def fill() -> None:
        for number in range(100):
            writer.append(_chunk(bytes([number]) * (1 << 20)))

    with pytest.raises(StoreError, match="full") as caught:
        fill()
    assert caught.value.kind == "enospc"
    assert caught.value.where == layout.segment(SNAPSHOT, 0, 0)
    writer.abort()
