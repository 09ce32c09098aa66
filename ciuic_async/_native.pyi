"""The compiled core (csrc/). Only ``ciuic_async.native`` imports it. Every call releases the GIL while it works.

Buffers are contiguous objects of the buffer protocol, held for the time of a call.
"""

from ciuic_async.format.digest import Buffer

DIRECT_ALIGNMENT_BYTES: int
MAX_CHUNK_BYTES: int
MAX_ITEM_BYTES: int
PLANE_RAW: int
PLANE_ZSTD: int
TRANSFORM_NONE: int
TRANSFORM_XOR: int
TRANSFORM_DIFFERENCE: int
TRANSFORM_ROTATED: int

def copy_many(pairs: list[tuple[int, int, int]], threads: int) -> None:
    """Copy (destination address, source address, size in bytes) on up to ``threads`` threads, all joined on return.

    Addresses are trusted: ranges must be valid, stay alive, and destinations must overlap nothing else. Big ranges
    bypass the caches.

    Raises:
        ValueError: no tuples of three, or no thread.
    """

def copy_columns(destinations: Buffer, sources: Buffer, sizes_bytes: Buffer, threads: int) -> None:
    """Like ``copy_many``, from three arrays of 64-bit numbers: row after row. A source of 0 fills with zeros.

    Raises:
        ValueError: the arrays differ in length or are no such arrays, or no thread.
    """

class TwiceCopier:
    """Rows like those of ``copy_columns``, copied part by part by threads that read the bytes at once.

    Raises:
        ValueError: as ``copy_columns``, or the destinations do not rise, or overlap.
    """

    def __init__(self, destinations: Buffer, sources: Buffer, sizes_bytes: Buffer) -> None: ...
    def copy(self, destination: int, twin: bytearray | memoryview) -> None:
        """Copy what belongs to the ``len(twin)`` bytes from ``destination`` on, and the very same bytes into ``twin``.

        The destination is written past the caches; ``twin`` stays in them. Several threads may call this for parts
        that do not overlap.

        Raises:
            ValueError: the rows do not cover these bytes; what was written is undefined.
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

def estimate_planes(
    raw: Buffer, base: Buffer | None, item_size_bytes: int, transform: int, minimum_gain_permille: int
) -> int:
    """About how many bytes ``encode_planes`` would give, by a sample: for comparing transforms. Raises like it."""

def encode_planes(
    raw: Buffer, base: Buffer | None, item_size_bytes: int, transform: int, level: int, minimum_gain_permille: int
) -> tuple[list[tuple[int, int]], bytearray] | None:
    """Split the transformed items, and compress what of each plane shrinks by the minimum gain.

    Args:
        raw: the chunk.
        base: as long, for ``TRANSFORM_XOR`` and ``TRANSFORM_DIFFERENCE``; None for the others.
        item_size_bytes: of the elements.
        transform: what is done to items first; difference and rotation are for items of 2, 4 and 8 bytes.
        level: zstd's for planes in which bytes repeat; 0: every plane is coded byte by byte, without the library.
        minimum_gain_permille: below, blocks are stored as they are.

    Returns:
        The plane directory (method, stored size) and the payload; None where no plane shrinks.

    Raises:
        ValueError: not a whole number of items of 1, 2, 4, 8 or 16 bytes, more than 64 MiB, no such transform, or no
            base where one is needed, one too many, or one of another length.
    """

def decode_planes(
    payload: Buffer,
    planes: list[tuple[int, int]] | tuple[tuple[int, int], ...],
    base: Buffer | None,
    transform: int,
    out: bytearray | memoryview,
) -> None:
    """Fill ``out`` exactly; the item size is the number of planes. The payload is hostile; ``base`` as for encoding.

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

    def lend(self, data: Buffer) -> None:
        """Like ``append``, without a copy where memory and file allow direct writes.

        ``data`` must neither change nor go until ``drain``, ``finish`` or ``abort`` returned.
        """

    def drain(self) -> None:
        """Return when nothing that was lent is needed any more. Raises OSError like ``append``."""

    def finish(self) -> int:
        """Write the rest and end the thread; the file's length. Raises OSError like ``append``."""

    def abort(self) -> None:
        """Drop what is not written and end the thread. Idempotent."""

    @property
    def direct_bytes(self) -> int:
        """How many bytes were written past the page cache so far."""

    @property
    def busy_s(self) -> float:
        """Seconds that the thread spent writing, not waiting for work."""
