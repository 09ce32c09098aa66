"""Memory for reading past the page cache: aligned, and made once for each thread."""

from __future__ import annotations

import ctypes
import mmap
import threading

from ciuic_async.format.segment import DIRECT_ALIGNMENT_BYTES, align_up

_HUGE_PAGE_BYTES = 2 << 20
_libc = ctypes.CDLL(None)
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


class AlignedMemory:
    """One buffer that grows; it starts at a multiple of 4096. For one thread at a time.

    Large ones lie on huge pages: the kernel hands a direct read to the disk in pieces of at most some 250 pages, and
    with pages of 4 KiB reads run at less than half the speed (measured: 1.1 instead of 2.7 GB/s). A forked child does
    not have the memory. It goes back to the system when neither this object nor a view of it is left.
    """

    def __init__(self) -> None:
        self._view = memoryview(b"")

    def take(self, size_bytes: int) -> memoryview:
        """The first ``size_bytes``, writable; the bytes of the last ``take`` while it was no smaller.

        Raises:
            MemoryError.
        """
        if len(self._view) < size_bytes:
            self._view = memoryview(b"")  # what is too small goes before its successor comes
            self._view = _allocate(size_bytes)
        return self._view[:size_bytes]


class ThreadMemory(threading.local):
    """The buffers of one thread, by number."""

    def __init__(self) -> None:
        self._buffers: dict[int, AlignedMemory] = {}

    def take(self, number: int, size_bytes: int) -> memoryview:
        """``AlignedMemory.take`` of buffer ``number``."""
        buffer = self._buffers.get(number)
        if buffer is None:
            buffer = self._buffers[number] = AlignedMemory()
        return buffer.take(size_bytes)


def prefer_huge_pages(address: int, size_bytes: int) -> None:
    """Ask that fresh memory comes in huge pages: touching it for the first time then costs a fifth. Advice, no more.

    The address is trusted: it is not written to, but the memory has to be the process's own.
    """
    start = align_up(address, mmap.PAGESIZE)
    size = (address + size_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))


def unmap_pages(mapping: memoryview) -> None:
    """Take the pages of a file's private mapping out of this process, without the GIL; touched again they come back.

    Only for a mapping that was not written to.
    """
    start = ctypes.c_char.from_buffer(mapping)
    _libc.madvise(ctypes.byref(start), ctypes.c_size_t(len(mapping)), ctypes.c_int(mmap.MADV_DONTNEED))


def _allocate(size_bytes: int) -> memoryview:
    huge = size_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    size = align_up(size_bytes, _HUGE_PAGE_BYTES if huge else DIRECT_ALIGNMENT_BYTES)
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE_BYTES if huge else size, **_PRIVATE)
        if hasattr(mmap, "MADV_DONTFORK"):
            # A process that forks in the middle of a direct read may find the bytes in the child's page (open(2)).
            memory.madvise(mmap.MADV_DONTFORK)
        if not huge:
            return memoryview(memory)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise MemoryError(f"no memory to read {size_bytes} bytes into") from error
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = align_up(address, _HUGE_PAGE_BYTES) - address
    return memoryview(memory)[start : start + size]
