"""Reading past the page cache, in runs, in parallel, and straight to where the bytes belong."""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ciuic_async import IntegrityError, NotFoundError, load, native, save
from ciuic_async.chain import SnapshotChain
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import InternalError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference
from ciuic_async.format.manifest import Manifest, Shard, StoredTensor
from ciuic_async.options import READ
from ciuic_async.pipeline import placement
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.segments import reader as reader_module
from ciuic_async.segments.open_segments import OpenSegments
from ciuic_async.segments.reader import ChunkRequest
from ciuic_async.segments.scratch import AlignedMemory, ThreadMemory, prefer_huge_pages
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.base import DirectFile
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore

pytestmark = [pytest.mark.damages, pytest.mark.usefixtures("no_leaks")]

SNAPSHOT = "0123456789abcdef0123"
PATH = layout.segment(SNAPSHOT, 0, 0)
BLOCK = segment.DIRECT_ALIGNMENT_BYTES


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    yield store
    store.close()


def _blocks(count: int) -> memoryview:
    return AlignedMemory().take(count * BLOCK)


def _random(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def _segment(store: Any, contents: list[bytes]) -> list[ChunkRequest]:
    """One published segment with these chunks, raw, in order."""
    writer = SegmentWriter(store, SNAPSHOT)
    for raw in contents:
        writer.append(RawCodec().encode(memoryview(raw), digest(raw), 1))
    finished = writer.finish()
    store.publish(finished.files)
    return [ChunkRequest(digest(raw), len(raw), finished.locations[digest(raw)]) for raw in contents]


def _damage(store: LocalStore, at: int) -> None:
    path = Path(store.url) / PATH
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
        os.fsync(file.fileno())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK, 5 * BLOCK + 17])
def test_every_range_of_blocks_is_filled(store: LocalStore, size_bytes: int) -> None:
    """Whole blocks come back as they are in the file; where it ends, the count says so, whatever its length."""
    content = _random(size_bytes)
    store.create(PATH, content)
    file = store.open_direct(PATH)
    for first in range(7):
        for count in range(1, 7 - first):
            buffer = _blocks(count)
            expected = content[first * BLOCK : (first + count) * BLOCK]
            assert file.read_aligned(first * BLOCK, buffer) == len(expected)
            assert buffer[: len(expected)] == expected
    file.close()
    file.close()


def test_what_the_file_system_refuses_goes_through_the_page_cache(store: LocalStore) -> None:
    """A read that direct I/O cannot do (here an odd offset) succeeds all the same, and so do those after it."""
    content = _random(4 * BLOCK)
    store.create(PATH, content)
    file = store.open_direct(PATH)
    buffer = _blocks(1)
    for offset in (3, BLOCK, 3 * BLOCK + 1):
        count = file.read_aligned(offset, buffer)
        assert buffer[:count] == content[offset : offset + BLOCK]
    file.close()


def test_a_file_system_without_direct_reads(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where opening for direct I/O is refused, the file is opened without."""
    content = _random(2 * BLOCK)
    store.create(PATH, content)
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    file = store.open_direct(PATH)
    buffer = _blocks(2)
    assert file.read_aligned(0, buffer) == len(content)
    assert buffer == content
    file.close()


def test_no_symbolic_link_is_followed(store: LocalStore, tmp_path: Path) -> None:
    """Neither a segment nor its folder may be a link, as for every other read; a missing one says so."""
    (tmp_path / "outside").write_bytes(b"secret")
    folder = Path(store.url) / "segments"
    (folder / SNAPSHOT).mkdir()
    (folder / SNAPSHOT / "0-0.seg").symlink_to(tmp_path / "outside")
    (folder / ("b" * 20)).symlink_to(tmp_path)
    for name in (PATH, layout.segment("b" * 20, 0, 0)):
        with pytest.raises(IntegrityError) as caught:
            store.open_direct(name)
        assert caught.value.kind == "symbolic_link"
    with pytest.raises(NotFoundError):
        store.open_direct(layout.segment(SNAPSHOT, 0, 1))


def test_open_segments_are_bounded_and_closed(store: LocalStore) -> None:
    """However many segments many threads read, no more stay open than the limit; after close none."""
    names = [layout.segment(SNAPSHOT, 0, number) for number in range(12)]
    for number, name in enumerate(names):
        store.create(name, bytes([number]) * BLOCK)
    files = OpenSegments(store, limit=3)
    wrong: list[str] = []

    def read(seed: int) -> None:
        buffer = _blocks(1)
        choice = random.Random(seed)
        for _ in range(100):
            number = choice.randrange(len(names))
            with files.lease(names[number]) as file:
                file.read_aligned(0, buffer)
                if buffer != bytes([number]) * BLOCK:
                    wrong.append(names[number])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert _open_below(store.url) == 3
    files.close()
    files.close()
    assert _open_below(store.url) == 0


def _open_below(folder: str) -> int:
    """Segments of a chain that this process has open."""
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{entry}").startswith(folder + "/segments/")
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [1, 5000, 1 << 20, (4 << 20) + 1, 9 << 20])
def test_buffers_are_aligned_and_keep_their_bytes(size_bytes: int) -> None:
    """Direct I/O asks for an address at a block. A smaller take shows the same bytes; a view outlives its successor."""
    memory = AlignedMemory()
    view = memory.take(size_bytes)
    view[:] = b"\x01" * size_bytes
    assert len(view) == size_bytes
    assert torch.frombuffer(view, dtype=torch.uint8).data_ptr() % BLOCK == 0
    assert memory.take(1) == b"\x01"
    larger = memory.take(4 * size_bytes + (8 << 20))
    assert torch.frombuffer(larger, dtype=torch.uint8).data_ptr() % BLOCK == 0
    assert view == b"\x01" * size_bytes


def test_more_memory_than_there_can_be_is_a_memory_error() -> None:
    """A buffer that cannot be had says how large it was to be; a smaller one is to be had afterwards."""
    memory = AlignedMemory()
    with pytest.raises(MemoryError, match=str(1 << 60)):
        memory.take(1 << 60)
    assert len(memory.take(100)) == 100


@pytest.mark.parametrize(("size_bytes", "expected"), [(5000, {"dc"}), (4 << 20, {"dc", "hg"})])
def test_buffers_stay_out_of_forks(size_bytes: int, expected: set[str]) -> None:
    """A direct read and a fork at the same time may part a page from its bytes: children get no such memory (``dc``).

    Large buffers ask for huge pages (``hg``).
    """
    view = AlignedMemory().take(size_bytes)
    address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    flags: set[str] = set()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(end, 16) for end in fields[0].split("-"))
            inside = low <= address < high
        elif inside and fields[0] == "VmFlags:":
            flags = set(fields[1:])
    assert expected <= flags


def test_threads_share_no_buffer() -> None:
    """What one thread reads, another cannot overwrite; buffers of one thread are apart by number."""
    memory = ThreadMemory()
    mine = [memory.take(number, 100) for number in (0, 1, -1)]
    for number, view in enumerate(mine):
        view[:] = bytes([number]) * 100
    thread = threading.Thread(target=lambda: memory.take(0, 100).__setitem__(slice(None), b"\xff" * 100))
    thread.start()
    thread.join()
    assert [bytes(view) for view in mine] == [bytes([number]) * 100 for number in range(3)]


def test_asking_for_huge_pages_changes_nothing() -> None:
    """The advice may be given for memory of any size and place; its bytes stay."""
    for size in (0, 1, 4096, 5 << 20):
        tensor = torch.full((size,), 7, dtype=torch.uint8)
        prefer_huge_pages(tensor.data_ptr(), size)
        assert bool((tensor == 7).all())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["direct", "through the cache", "in memory"])
def test_a_run_gives_every_chunk(store: LocalStore, kind: str) -> None:
    """Many records read at once are the same bytes as one by one, in every store, whatever lies between them."""
    place = MemoryStore() if kind == "in memory" else store
    contents = [_random(size, size) for size in (1, 70_000, 4096, 5, (1 << 20) + 3, 64, 300_000)]
    requests = _segment(place, contents)
    with chunk_reader(place, direct=kind == "direct") as reader:
        assert [bytes(raw) for raw in reader.read_run(requests)] == contents
        some = [requests[0], requests[3], requests[6]]
        assert [bytes(raw) for raw in reader.read_run(some)] == [contents[0], contents[3], contents[6]]
        assert list(reader.read_run([])) == []


def test_damage_in_a_run_is_told_for_its_own_chunk(store: LocalStore) -> None:
    """Chunks before a damaged one are good; the damaged one raises, naming its record."""
    contents = [_random(5000, number) for number in range(5)]
    requests = _segment(store, contents)
    _damage(store, requests[2].end_bytes - 1)
    with chunk_reader(store) as reader:
        run = reader.read_run(requests)
        assert [bytes(next(run)), bytes(next(run))] == contents[:2]
        with pytest.raises(IntegrityError, match=f"record at {requests[2].location.offset_bytes}:") as caught:
            next(run)
        assert (caught.value.kind, caught.value.where) == ("digest_mismatch", PATH)


@pytest.mark.parametrize("cut", [1, 200, 3000, 5000])
def test_a_segment_that_ends_in_a_run(store: LocalStore, cut: int) -> None:
    """Whatever is left whole is read; the chunk at the cut is ``truncated``, alone as in a run."""
    contents = [_random(5000, number) for number in range(3)]
    requests = _segment(store, contents)
    path = Path(store.url) / PATH
    path.chmod(0o644)
    os.truncate(path, requests[1].end_bytes - cut)
    with chunk_reader(store) as reader:
        run = reader.read_run(requests)
        assert next(run) == contents[0]
        for read in (lambda: next(run), lambda: _read(reader, requests[1])):
            with pytest.raises(IntegrityError) as caught:
                read()
            assert (caught.value.kind, caught.value.where) == ("truncated", PATH)


def _read(reader: reader_module.SegmentReader, request: ChunkRequest) -> memoryview:
    return reader.read_chunk(request.digest, request.raw_size_bytes, request.location)


def _request(path: str, offset: int, size: int) -> placement.Job:
    location = ChunkLocation(SegmentReference(path, 1 << 30, bytes(32)), offset, size, segment.CODEC_RAW)
    return placement.Job(ChunkRequest(bytes(32), size, location))


def test_runs_are_near_and_bounded() -> None:
    """Records go together while they lie close in one segment and fit; a record larger than a run has its own."""
    small, gap, limit = 1000, READ.run_gap_bytes, READ.run_size_bytes
    jobs = [
        _request("a", 64, small),
        _request("a", 64 + small, small),
        _request("a", 64 + 2 * small + gap, small),
        _request("a", 64 + 3 * small + 2 * gap + 1, small),
        _request("b", 64 + 4 * small + 2 * gap + 1, small),
        _request("b", 1 << 20, limit + 1),
        _request("b", (1 << 20) + limit + 1, small),
    ]
    assert [len(run) for run in placement.plan_runs(jobs)] == [3, 1, 1, 1, 1]
    overlapping = [_request("a", 64, small), _request("a", 128, small)]
    assert [len(run) for run in placement.plan_runs(overlapping)] == [1, 1]
    many = [_request("a", 64 + number * (64 << 10), 64 << 10) for number in range(200)]
    runs = placement.plan_runs(many)
    assert [job for run in runs for job in run] == many
    assert all(run[-1].chunk.end_bytes - run[0].chunk.location.offset_bytes <= limit for run in runs)
    assert len(runs) == 4


# --- placing ----------------------------------------------------------------------------------------------------------


def _state() -> dict[str, Any]:
    """Packs of tensors of odd sizes, a tensor of several chunks, an empty one, another dtype."""
    generator = torch.Generator().manual_seed(1)
    small = {str(n): torch.randn(n % 37, generator=generator) for n in range(300)}
    middle = {str(n): torch.randn(20_000 + n, generator=generator) for n in range(10)}
    large = torch.randn(3_000_001, generator=generator)
    return {"small": small, "middle": middle, "large": large, "half": torch.arange(5).to(torch.float16)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(torch.equal(one, other))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("compiled", [True, False])
def test_all_bytes_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, compiled: bool) -> None:
    """With any number of threads, with and without the native core, what is loaded is what was saved."""
    saved = _state()
    save(saved, tmp_path / "chain")
    if not compiled:
        monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(placement, "READ", replace(READ, threads=threads))
    assert _same(load(tmp_path / "chain"), saved)


class _WatchedStore(LocalStore):
    """Notes the ranges of segments that are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ranges: list[tuple[int, int]] = []

    def open_direct(self, name: str) -> DirectFile:
        return _WatchedFile(super().open_direct(name), self.ranges)


class _WatchedFile:
    def __init__(self, inner: DirectFile, ranges: list[tuple[int, int]]) -> None:
        self._inner = inner
        self._ranges = ranges

    def read_aligned(self, offset_bytes: int, buffer: memoryview) -> int:
        self._ranges.append((offset_bytes, offset_bytes + len(buffer)))
        return self._inner.read_aligned(offset_bytes, buffer)

    def close(self) -> None:
        self._inner.close()


def test_partial_loads_read_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``only=`` reads the blocks of the chosen tensors' records and no more, each once."""
    saved = {str(number): torch.randn(1 << 20) for number in range(8)}
    save(saved, tmp_path / "chain", codec="raw")
    watched = _WatchedStore(tmp_path / "chain")
    monkeypatch.setattr("ciuic_async.chain.resolve_store", lambda url, _options: watched)
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        loaded = chain.latest().load(only=["2", "5"])
    assert _same(loaded, {"2": saved["2"], "5": saved["5"]})
    size = 4 << 20
    assert len(watched.ranges) == 2
    assert all(size < end - start <= size + 2 * BLOCK for start, end in watched.ranges)


def test_damage_stops_all_threads_and_names_the_tensor(tmp_path: Path) -> None:
    """One bad chunk of many: the error names the tensor and the file, and no thread is left behind."""
    saved = {f"t{number}": torch.randn(1 << 18) for number in range(24)}
    save(saved, tmp_path / "chain", codec="raw")
    (path,) = (tmp_path / "chain" / "segments").rglob("*.seg")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[content.index(saved["t7"].numpy().tobytes()[:64]) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="tensor t7:") as caught:
        load(tmp_path / "chain")
    assert caught.value.kind == "digest_mismatch"
    assert str(caught.value.where).startswith("segments/")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-read")]


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while threads read: it is raised, but not before the last of them has let go of the targets."""
    inside = threading.Event()
    go_on = threading.Event()
    finished: list[int] = []

    def work(item: int) -> None:
        if threading.current_thread() is threading.main_thread():
            inside.wait(10)
            go_on.set()
            raise KeyboardInterrupt
        inside.set()
        go_on.wait(10)
        finished.append(item)

    with pytest.raises(KeyboardInterrupt):
        placement._in_parallel(work, list(range(10)), 2)
    assert finished
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-read")]


def _resolved(tensors: list[StoredTensor], chunks: dict[bytes, ChunkLocation]) -> Any:
    content = Manifest(SNAPSHOT, "dict", (), (), tuple(tensors))
    entry = SimpleNamespace(snapshot=SNAPSHOT, manifest=SimpleNamespace(path="manifests/root.json"))
    return SimpleNamespace(entry=entry, manifest=content, locator=Locator(SNAPSHOT, 0, chunks))


def _stored(name: str, size_bytes: int, chunk: bytes) -> StoredTensor:
    shard = Shard((0,), (size_bytes,), 4 << 20, chunk)
    return StoredTensor((name,), "uint8", (size_bytes,), "cpu", (shard,))


def test_a_chunk_of_two_sizes_is_refused(store: LocalStore) -> None:
    """Bytes are copied by address: a manifest that claims a chunk to be long and short is refused before any read."""
    (request,) = _segment(store, [b"x" * 100])
    tensors = [_stored("long", 100, request.digest), _stored("short", 10, request.digest)]
    targets = {number: torch.zeros(size, dtype=torch.uint8) for number, size in enumerate((100, 10))}
    with pytest.raises(IntegrityError) as caught:
        placement.read_tensors(store, _resolved(tensors, {request.digest: request.location}), targets)
    assert caught.value.kind == "bad_manifest"
    assert not any(bool(target.any()) for target in targets.values())


@pytest.mark.parametrize("target", [torch.zeros(99), torch.zeros(50, 2, dtype=torch.uint8).T])
def test_targets_that_do_not_fit_are_a_bug(store: LocalStore, target: torch.Tensor) -> None:
    """A target of another size, or with gaps, is never written to."""
    (request,) = _segment(store, [b"x" * 100])
    resolved = _resolved([_stored("one", 100, request.digest)], {request.digest: request.location})
    with pytest.raises(InternalError) as caught:
        placement.read_tensors(store, resolved, {0: target})
    assert caught.value.kind == "bad_target"
    assert not bool(target.any())


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    """Listeners hear of every chunk once, from whichever thread, and the sizes add up."""
    saved = _state()
    save(saved, tmp_path / "chain")
    heard: list[Any] = []
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        chain.latest().load(listener=heard.append)
    restored = [event for event in heard if event.stage == "restore"]
    assert restored
    assert {event.total_bytes for event in restored} == {sum(event.size_bytes for event in restored)}
