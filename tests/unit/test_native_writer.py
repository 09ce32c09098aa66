"""DirectWriter: bytes arrive in order on any file system, errors stay, and no thread does."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_async import native

core = native.core
pytestmark = pytest.mark.skipif(core is None, reason="the native core is not in use")

PAGE = 4096
SHARED_MEMORY = Path("/dev/shm")


def _writer_threads() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == "ciuic-writer":
                found.append(int(task.name))
        except (FileNotFoundError, ProcessLookupError):  # ended since
            continue
    return found


@pytest.fixture(autouse=True)
def _no_native_threads() -> Iterator[None]:
    """The I/O thread of every writer has ended when its test has."""
    yield
    gc.collect()
    assert not _writer_threads()


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not SHARED_MEMORY.is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        yield Path(name)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 8 * PAGE, 8 * PAGE + 5, 50 * PAGE, 50 * PAGE + 4095])
def test_file_holds_exactly_what_was_appended(folder: Path, size: int) -> None:
    """Any length, in uneven pieces, on disk and in tmpfs; no preallocated block is left behind."""
    content = os.urandom(size)
    fd = _open(folder / "file")
    try:
        writer = core.DirectWriter(fd, 8 * PAGE, 2, 0)
        for start in range(0, size, 7001):
            writer.append(memoryview(content)[start : start + 7001])
        assert writer.finish() == size
        assert os.fstat(fd).st_size == size
        assert os.fstat(fd).st_blocks * 512 <= size + 2 * PAGE
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(fd)
    assert (folder / "file").read_bytes() == content


@settings(max_examples=25)
@given(pieces=st.lists(st.integers(0, 40_000), max_size=12), depth=st.integers(1, 3))
def test_any_pieces(pieces: list[int], depth: int) -> None:
    """However the bytes are cut, the file is their concatenation, and buffers may change after append."""
    with tempfile.TemporaryFile() as file:
        writer = core.DirectWriter(file.fileno(), 2 * PAGE, depth, 0)
        expected = b""
        for number, size in enumerate(pieces):
            piece = bytearray([number + 1]) * size
            expected += piece
            writer.append(piece)
            piece[:] = bytes(size)
        assert writer.finish() == len(expected)
        file.seek(0)
        assert file.read() == expected


def test_whole_blocks_bypass_the_page_cache_where_the_disk_can(tmp_path: Path) -> None:
    """Everything but an odd tail is written directly, if the file system has O_DIRECT at all."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT here")
    fd = _open(tmp_path / "file")
    try:
        writer = core.DirectWriter(fd, 4 * PAGE, 2, 0)
        writer.append(bytes(10 * PAGE + 100))
        writer.finish()
        assert writer.direct_bytes == 10 * PAGE
    finally:
        os.close(fd)


def test_full_device_is_reported_and_stays_reported() -> None:
    """The first error comes as OSError with its errno, from append or finish, and again at every later call."""
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        writer = core.DirectWriter(fd, PAGE, 2, 0)

        def fill() -> None:
            for _ in range(100):
                writer.append(bytes(PAGE))

        for call in (fill, lambda: writer.append(b"x"), writer.finish, writer.finish):
            with pytest.raises(OSError, match="No space left") as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


_LIMITED = """
import errno, os, resource, sys
from ciuic_async.native import core
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
writer = core.DirectWriter(fd, 65536, 2, 0)
try:
    for _ in range(64):
        writer.append(bytes(65536))
    writer.finish()
except OSError as error:
    print(errno.errorcode[error.errno], os.fstat(fd).st_size <= 1 << 20)
"""


def test_file_size_limit_is_an_error_and_no_signal(folder: Path) -> None:
    """Beyond RLIMIT_FSIZE the kernel sends SIGXFSZ: the process lives, and learns EFBIG."""
    process = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(folder / "file")], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["EFBIG", "True"]


def test_closed_descriptor_is_an_error(tmp_path: Path) -> None:
    """A caller's mistake with the descriptor is an OSError."""
    fd = os.open(tmp_path, os.O_RDONLY)
    writer = core.DirectWriter(fd, PAGE, 1, 0)
    writer.append(b"x")
    with pytest.raises(OSError, match=r"Bad file descriptor|Is a directory"):
        writer.finish()
    os.close(fd)


def test_abort_drops_and_is_idempotent(tmp_path: Path) -> None:
    """After abort, which may be repeated, nothing can be appended or finished."""
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, PAGE, 2, 0)
    writer.append(bytes(PAGE * 3))
    writer.abort()
    writer.abort()
    os.close(fd)
    with pytest.raises(RuntimeError, match="end of a writer"):
        writer.append(b"x")
    with pytest.raises(RuntimeError, match="after abort"):
        writer.finish()


def test_forgotten_writer_ends_its_thread(tmp_path: Path) -> None:
    """Dropping the object joins the thread before the descriptor can become another file's."""
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, PAGE, 2, 0)
    writer.append(bytes(PAGE * 5))
    del writer
    assert not _writer_threads()
    os.close(fd)


@pytest.mark.parametrize(("buffer", "depth"), [(0, 1), (100, 1), (PAGE + 1, 1), (PAGE, 0), (PAGE, 5000)])
def test_refuses_unusable_sizes(buffer: int, depth: int) -> None:
    """Buffers are whole pages, the queue is bounded."""
    with pytest.raises(ValueError, match=r"buffer size|queue depth"):
        core.DirectWriter(0, buffer, depth, 0)


def test_thread_is_nice_and_takes_no_signals(tmp_path: Path) -> None:
    """The I/O thread runs at the niceness asked for, blocks all signals, and leaves the caller's mask alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, PAGE, 1, 19)
    writer.append(bytes(PAGE * 4))  # more than the queue holds: the thread has begun
    (thread,) = _writer_threads()
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    niceness = os.getpriority(os.PRIO_PROCESS, thread)
    writer.finish()
    os.close(fd)
    assert niceness == 19
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ, signal.SIGUSR1):
        assert blocked >> (number - 1) & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of what is tested here
def test_forked_child_can_drop_it(tmp_path: Path) -> None:
    """A data loader's worker inherits the object and not its thread: it can drop it, and the parent goes on."""
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, PAGE, 2, 0)
    writer.append(bytes(PAGE * 3))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writer.abort()
            try:
                writer.append(b"x")
            except RuntimeError:
                del writer
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert writer.finish() == 3 * PAGE
    os.close(fd)


def test_calls_from_several_threads_do_not_mix(tmp_path: Path) -> None:
    """Each append is one run of bytes, whoever calls at the same time."""
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, 2 * PAGE, 2, 0)

    def append(letter: bytes) -> None:
        for _ in range(50):
            writer.append(letter * 3000)

    threads = [threading.Thread(target=append, args=(bytes([65 + number]),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.finish() == 4 * 50 * 3000
    os.close(fd)
    content = (tmp_path / "file").read_bytes()
    assert all(len(set(content[at : at + 3000])) == 1 for at in range(0, len(content), 3000))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Far more bytes than the queue holds go through without growing the process by them."""
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, 64 * PAGE, 2, 0)
    piece = bytes(1 << 20)
    writer.append(piece)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(64):
        writer.append(piece)
    writer.finish()
    os.close(fd)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 16 << 10


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 3), st.integers(0, 9000)), min_size=1, max_size=12
    ),
    depth=st.integers(1, 3),
)
def test_what_is_lent_and_what_is_copied_arrive_in_order(pieces: list[tuple[bool, int, int, int]], depth: int) -> None:
    """Lending is appending: whatever is mixed, of whatever alignment and length, the file holds the same bytes."""
    memory = mmap.mmap(-1, 128 * PAGE)
    memory[:] = bytes(range(256)) * (128 * PAGE // 256)
    expected = bytearray()
    with tempfile.TemporaryDirectory() as name:
        fd = _open(Path(name) / "file")
        writer = core.DirectWriter(fd, 2 * PAGE, depth, 0)
        for lends, page, odd, rest in pieces:
            start = page * PAGE + odd
            data = memoryview(memory)[start : start + 17 * PAGE + rest - odd]
            if lends:
                pad = bytes(-len(expected) % PAGE)  # as a segment's writer does before a large raw record
                writer.append(pad)
                expected += pad
                writer.lend(data)
            else:
                writer.append(data)
            expected += data
            data.release()
        writer.drain()
        assert writer.finish() == len(expected)
        assert os.pread(fd, len(expected) + 1, 0) == expected
        os.close(fd)


def test_lent_memory_is_free_after_drain(tmp_path: Path) -> None:
    """After drain the lent bytes may change: the file keeps what was lent."""
    memory = mmap.mmap(-1, 64 * PAGE)
    memory[:] = b"a" * (64 * PAGE)
    fd = _open(tmp_path / "file")
    writer = core.DirectWriter(fd, PAGE, 2, 0)
    writer.lend(memory)
    writer.drain()
    memory[:] = b"b" * (64 * PAGE)
    assert writer.finish() == 64 * PAGE
    assert os.pread(fd, 64 * PAGE, 0) == b"a" * (64 * PAGE)
    assert writer.busy_s > 0
    os.close(fd)
