"""The compiled core (csrc/). Only ``ciuic_async.native`` imports it. Every call releases the GIL while it works.

Buffers are contiguous objects of the buffer protocol, held for the time of a call.
"""

from ciuic_async.format.digest import Buffer

DIRECT_ALIGNMENT_BYTES: int
MAX_CHUNK_BYTES: int
MAX_ITEM_BYTES: int
PLANE_RAW: int
PLANE_ZSTD: int

def copy_many(pairs: list[tuple[int, int, int]], threads: int) -> None:
    """Copy (destination address, source address, size in bytes) on up to ``threads`` threads, all joined on return.

    Addresses are trusted: ranges must be valid, stay alive, and destinations must overlap nothing else. Big ranges
    bypass the caches.

    Raises:
        ValueError: no tuples of three, or no thread.
    """

def touch(address: int, size_bytes: int) -> None:
    """Make every page of a writable range present, changing no byte. The address is trusted."""

def split_planes(items: Buffer, planes: bytearray | memoryview, item_size_bytes: int) -> None:
    """Write byte 0 of every item, then byte 1, and so on. Raises ValueError: sizes do not fit, or buffers overlap."""

def merge_planes(planes: Buffer, items: bytearray | memoryview, item_size_bytes: int) -> None:
    """The inverse of ``split_planes``."""

def zstd_available() -> bool:
    """Whether libzstd.so.1 was found."""

def zstd_version() -> int:
    """major * 10000 + minor * 100 + patch, or 0."""

def encode_planes(
    raw: Buffer, item_size_bytes: int, level: int, minimum_gain_permille: int, probe_size_bytes: int
) -> tuple[list[tuple[int, int]], bytearray] | None:
    """Split, and compress the planes of which a sample shrinks by the minimum gain.

    Returns:
        The plane directory (method, stored size) and the payload; None where no plane shrinks.

    Raises:
        ValueError: not a whole number of items of 1, 2, 4, 8 or 16 bytes, or more than 64 MiB.
    """

def decode_planes(payload: Buffer, planes: list[tuple[int, int]], out: bytearray | memoryview) -> None:
    """Fill ``out`` exactly; the item size is the number of planes. The payload is hostile.

    Raises:
        ValueError: it does not decode to exactly these sizes; ``out`` is undefined.
        RuntimeError: zstd is needed and not available.
    """

class DirectWriter:
    """Appends to the empty file ``fd`` from a thread of its own, with O_DIRECT where the file system has it.

    Neither closes nor syncs ``fd``, which must stay open until ``finish`` or ``abort`` returned. Of no use in a forked
    child.
    """

    def __init__(self, fd: int, buffer_size_bytes: int, queue_depth: int, niceness: int) -> None: ...
    def append(self, data: Buffer) -> None:
        """Copy ``data`` and return; waits only while all buffers are being written.

        Raises:
            OSError: the first write that failed, now and at every later call.
        """

    def finish(self) -> int:
        """Write the rest and end the thread; the file's length. Raises OSError like ``append``."""

    def abort(self) -> None:
        """Drop what is not written and end the thread. Idempotent."""

    @property
    def direct_bytes(self) -> int:
        """How many bytes were written past the page cache so far."""
