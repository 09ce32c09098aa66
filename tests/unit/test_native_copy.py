"""copy_many, copy_columns and touch."""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import native

core = native.core
pytestmark = pytest.mark.skipif(core is None, reason="the native core is not in use")

BIG = 96 << 20


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@given(
    sizes=st.lists(st.one_of(st.integers(0, 200), st.integers(250_000, 1_300_000)), max_size=6),
    skew=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    threads=st.integers(1, 5),
)
def test_copies_exactly_the_ranges(sizes: list[int], skew: tuple[int, int], threads: int) -> None:
    """Whatever sizes, alignment and threads: ranges arrive, and no byte beside them changes."""
    source = _noise(sum(sizes) + skew[0])
    gap = 3
    target = np.full(sum(sizes) + gap * (len(sizes) + 1) + skew[1], 0xA5, dtype=np.uint8)
    expected = target.copy()
    pairs = []
    read, write = skew[0], skew[1] + gap
    for size in sizes:
        pairs.append((target.ctypes.data + write, source.ctypes.data + read, size))
        expected[write : write + size] = source[read : read + size]
        read, write = read + size, write + size + gap
    core.copy_many(pairs, threads)
    assert np.array_equal(target, expected)


@given(
    sizes=st.lists(
        st.tuples(st.one_of(st.integers(0, 9000), st.integers(250_000, 1_300_000)), st.booleans()), max_size=9
    ),
    skew=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    threads=st.integers(1, 5),
)
def test_columns_copy_and_fill_exactly_the_ranges(
    sizes: list[tuple[int, bool]], skew: tuple[int, int], threads: int
) -> None:
    """From columns, too: what has a source arrives, what has none is zeros, and no byte beside them changes."""
    total = sum(size for size, _ in sizes)
    source = _noise(total + skew[0])
    gap = 3
    target = np.full(total + gap * (len(sizes) + 1) + skew[1], 0xA5, dtype=np.uint8)
    expected = target.copy()
    rows = []
    read, write = skew[0], skew[1] + gap
    for size, has_source in sizes:
        rows.append((target.ctypes.data + write, source.ctypes.data + read if has_source else 0, size))
        expected[write : write + size] = source[read : read + size] if has_source else 0
        read, write = read + size, write + size + gap
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), 3).T.copy()
    core.copy_columns(*columns, threads)
    assert np.array_equal(target, expected)


@given(
    sizes=st.lists(
        st.tuples(st.one_of(st.integers(0, 9000), st.integers(250_000, 700_000)), st.booleans()), min_size=1, max_size=9
    ),
    skew=st.integers(0, 70),
    cut=st.floats(0, 1),
)
def test_bytes_arrive_twice(sizes: list[tuple[int, bool]], skew: int, cut: float) -> None:
    """Any part of adjoining rows arrives in both places, zeros where no source is, and no byte beside it changes."""
    total = sum(size for size, _ in sizes)
    source = _noise(total)
    target = np.full(total + skew + 1, 0xA5, dtype=np.uint8)
    expected = target.copy()
    rows, at = [], 0
    for size, has_source in sizes:
        rows.append((target.ctypes.data + skew + at, source.ctypes.data + at if has_source else 0, size))
        expected[skew + at : skew + at + size] = source[at : at + size] if has_source else 0
        at += size
    copier = core.TwiceCopier(*np.array(rows, dtype=np.int64).T.copy())
    low = int(total * cut)
    for start, end in ((low, total), (0, low)):
        twin = bytearray(end - start)
        copier.copy(target.ctypes.data + skew + start, twin)
        assert bytes(twin) == expected[skew + start : skew + end].tobytes()
        assert low == 0 or start == 0 or (target[: start + skew] == 0xA5).all()
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("rows", [[(0, 4), (5, 4)], [(2, 8)], [(0, 8)], []])
def test_rows_that_leave_a_gap_are_refused(rows: list[tuple[int, int]]) -> None:
    """Bytes that no row holds are an error, not stale memory."""
    source, target = np.zeros(16, dtype=np.uint8), np.zeros(16, dtype=np.uint8)
    columns = [[target.ctypes.data + at, source.ctypes.data, size] for at, size in rows]
    copier = core.TwiceCopier(*np.array(columns, dtype=np.int64).reshape(len(rows), 3).T.copy())
    with pytest.raises(ValueError, match="do not cover"):
        copier.copy(target.ctypes.data, bytearray(10))


def test_rows_out_of_order_are_refused() -> None:
    """Rows that overlap or come in another order cannot be searched, and are refused at once."""
    with pytest.raises(ValueError, match="rise"):
        core.TwiceCopier(*(array("Q", numbers) for numbers in ((64, 0), (0, 0), (8, 8))))
    with pytest.raises(ValueError, match="rise"):
        core.TwiceCopier(*(array("Q", numbers) for numbers in ((0, 7), (0, 0), (8, 8))))


def test_a_big_hole_is_filled_by_all_threads() -> None:
    """A range of zeros is cut for several threads like any other."""
    target = np.full((9 << 20) + 5, 0xA5, dtype=np.uint8)
    core.copy_columns(*(array("Q", [number]) for number in (target.ctypes.data, 0, len(target))), 4)
    assert not target.any()


@pytest.mark.parametrize(
    "columns",
    [
        (b"", b"", bytes(8)),
        (bytes(8), bytes(8), bytes(16)),
        (bytes(7), bytes(7), bytes(7)),
        ([1], [2], [3]),
        (np.zeros((2, 2), np.int64)[:, 0], bytes(16), bytes(16)),
    ],
    ids=["one is longer", "one is longer still", "no whole numbers", "lists", "not contiguous"],
)
def test_refuses_what_are_no_columns(columns: tuple[object, object, object]) -> None:
    """Columns of different length, or no arrays, are a Python error before any byte is copied."""
    with pytest.raises((ValueError, TypeError, BufferError)):
        core.copy_columns(*columns, 1)


def test_many_threads_for_one_range() -> None:
    """One big odd range, cut for more threads than there are cores, arrives whole."""
    source = _noise((17 << 20) + 13)
    target = np.zeros_like(source)
    core.copy_many([(target.ctypes.data, source.ctypes.data, len(source))], 7)
    assert np.array_equal(target, source)


@pytest.mark.parametrize("pairs", [[(1, 2)], [[1, 2, 3]], ["abc"], [(-1, 2, 3)], [(1.5, 2, 3)]])
def test_refuses_what_is_no_range(pairs: list[object]) -> None:
    """A wrong list is a Python error before any byte is copied."""
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        core.copy_many(pairs, 1)


def test_refuses_no_threads() -> None:
    """Zero threads is the caller's mistake."""
    with pytest.raises(ValueError, match="at least 1"):
        core.copy_many([], 0)
    with pytest.raises(ValueError, match="at least 1"):
        core.copy_columns(b"", b"", b"", 0)


def test_threads_are_joined_and_the_signal_mask_is_restored() -> None:
    """On return there are as many threads as before, and this one takes the same signals."""
    source, target = _noise(8 << 20), np.zeros(8 << 20, np.uint8)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    core.copy_many([(target.ctypes.data, source.ctypes.data, len(source))], 4)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert np.array_equal(target, source)


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 1), (1, 4096), (4095, 2), (17, 300_000)])
def test_touch_changes_nothing(start: int, size: int) -> None:
    """Touched memory holds what it held, for any alignment."""
    memory = _noise(310_000)
    before = memory.copy()
    core.touch(memory.ctypes.data + start, size)
    assert np.array_equal(memory, before)


@pytest.fixture
def _only_voluntary_switches() -> Iterator[None]:
    """Python threads change places only where one gives up the GIL itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(before)


def _copy() -> None:
    core.copy_many([(_TARGET.ctypes.data, _SOURCE.ctypes.data, BIG)], 1)


def _copy_columns() -> None:
    columns = ([_TARGET.ctypes.data], [_SOURCE.ctypes.data], [BIG])
    core.copy_columns(*(array("Q", column) for column in columns), 1)


def _touch() -> None:
    with mmap.mmap(-1, 128 << 20) as memory:  # of which no page is there yet: long enough for a thread to wake up
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        core.touch(ctypes.addressof(view), len(memory))
        del view


_SOURCE = np.zeros(BIG if core else 0, np.uint8)
_TARGET = np.zeros(BIG if core else 0, np.uint8)
_CHUNK = memoryview(_SOURCE)[: 64 << 20]
_OUT = memoryview(_TARGET)[: 64 << 20]


def _encode() -> None:
    assert core.encode_planes(_CHUNK, None, 4, core.TRANSFORM_NONE, -50, 80) is not None


def _decode() -> None:
    directory, payload = core.encode_planes(_CHUNK, None, 4, core.TRANSFORM_NONE, -50, 80)
    core.decode_planes(payload, directory, None, core.TRANSFORM_NONE, _OUT)


@pytest.mark.usefixtures("_only_voluntary_switches")
@pytest.mark.parametrize(
    "call",
    [
        _copy,
        _copy_columns,
        _touch,
        lambda: core.split_planes(_CHUNK, _OUT, 8),
        lambda: core.merge_planes(_CHUNK, _OUT, 8),
        _encode,
        _decode,
    ],
    ids=["copy_many", "copy_columns", "touch", "split_planes", "merge_planes", "encode_planes", "decode_planes"],
)
def test_releases_the_gil(call: Callable[[], object]) -> None:
    """While the core works another Python thread runs: without that, none could before the call returns."""
    if call in (_encode, _decode) and not core.zstd_available():
        pytest.skip("libzstd.so.1 is not there")
    for _ in range(20):  # a slow wake-up may miss one call; a call that keeps the GIL is missed every time
        ran = threading.Event()
        go = threading.Lock()
        go.acquire()
        other = threading.Thread(target=lambda go=go, ran=ran: (go.acquire(), ran.set()))
        other.start()
        go.release()
        call()
        seen = ran.is_set()
        other.join()
        if seen:
            break
    assert seen
