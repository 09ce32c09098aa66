"""The contract of a store: named, immutable byte strings.

Names are those of ``format/layout.py``: relative, ``/``-separated, ASCII. A store has two kinds of visible names: those
*created* (they appear whole or not at all, and never change) and those *overwritten* (the log head and nothing else;
a reader sees the old or the new bytes whole). Everything that a store reports as done is durable: it survives the
loss of power. Unpublished files are invisible to ``read``, ``size`` and ``list``.

Every store passes ``tests/contracts/test_store_contract.py``.

Errors: ``NotFoundError`` when a name is not there, ``CommitConflictError`` when a name to create is taken,
``StoreError`` for everything the place itself does wrong; each names the place. After a ``StoreError`` from a write
nothing is known about that name but that it is not half there.

All methods may be called from several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ciuic_async.errors import IntegrityError
from ciuic_async.format.digest import Buffer


def check_name(name: str) -> str:
    """``name`` if it stays inside a store: the last guard below ``layout.check_reference``.

    Raises:
        IntegrityError: kind ``bad_name``; the name is absolute, climbs, or holds an empty part or a NUL.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise IntegrityError(f"{name[:120]!r} is no name inside a store", kind="bad_name", where=name[:120])
    return name


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a place can do beyond the minimum."""

    orders_writers: bool
    """``create`` fails for the second of two racing writers; without this a chain has one writer."""
    file_descriptors: bool = False
    """Unpublished and published files have descriptors, for direct I/O."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One published name."""

    name: str
    size_bytes: int
    modified_s: float
    """Seconds on the store's own clock (see ``Store.now_s``)."""


class Unpublished(Protocol):
    """A file being filled. Belongs to one thread. Either ``publish``ed through its store or ``discard``ed."""

    name: str
    """The name it will have."""

    def write(self, data: Buffer, /) -> None:
        """Append all of ``data``. Raises StoreError; the file can then only be discarded.

        After ``publish`` or ``discard`` this is an InternalError (kind ``not_open``), as is publishing again.
        """

    def filled(self) -> None:
        """Nothing more will be written: what is kept of it in memory goes on its way. Raises StoreError, as ``write``.

        A snapshot has a file for each half gigabyte and publishes all of them in the end: what each keeps adds up. A
        store may give a large file its name now, for it is whole: discarded, it stays as an orphan, for gc. Files that
        are published soon need not be told.
        """

    def fileno(self) -> int:
        """Its descriptor, where the store has ``file_descriptors``; who writes to it appends in order.

        The descriptor belongs to this object and is closed by ``publish`` and ``discard``.
        """

    def discard(self) -> None:
        """Drop it. Never raises; may be called twice, and after ``publish`` does nothing."""


class DirectFile(Protocol):
    """A published file held open for many reads past the page cache. Any thread may read, several at once."""

    def read_aligned(self, offset_bytes: int, buffer: memoryview) -> int:
        """Fill ``buffer`` (writable, contiguous) from ``offset_bytes``. Releases the GIL. Raises StoreError.

        The offset, the buffer's length and its address are multiples of 4096. Where the file system has no reads past
        its cache, this goes through it.

        Returns:
            How many bytes were read: fewer than asked for only where the content ends.
        """

    def close(self) -> None:
        """Give the descriptor back; nobody may be reading. Idempotent. Happens by itself when it is dropped."""


@runtime_checkable
class DirectReads(Protocol):
    """What a store may have besides: files that are opened once for many reads. Others are read by ``read_into``."""

    def open_direct(self, name: str) -> DirectFile:
        """Open a published file. Raises like ``Store.read_into``; the file belongs to the caller."""


class Store(Protocol):
    """Named byte strings at one place."""

    @property
    def capabilities(self) -> Capabilities:
        """What the place can do. A remote one is tried, by writing, when first asked: only writers ask. StoreError."""

    @property
    def url(self) -> str:
        """The place, as a user would name it; for messages. Holds no secrets."""

    def initialize(self) -> None:
        """Make the place ready for writing (folders). Idempotent."""

    def read(self, name: str, limit_bytes: int) -> bytes:
        """The whole content; more than ``limit_bytes`` is an IntegrityError (kind ``file_too_large``), unread."""

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, contiguous) from ``offset_bytes``. Releases the GIL.

        Raises:
            IntegrityError: kind ``truncated``; the content ends before the buffer is full.
        """

    def size(self, name: str) -> int | None:
        """Length in bytes, or None when there is no such name."""

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """All published names that start with the folder ``prefix``, sorted. Not a consistent view."""

    def create(self, name: str, data: Buffer) -> None:
        """Publish ``data`` under a name that nobody has; durable on return.

        Raises:
            CommitConflictError: the name exists.
        """

    def overwrite(self, name: str, data: Buffer) -> None:
        """Publish ``data`` in place of what is there, atomically; durable on return.

        Only for what can be made again: the log head, tiles and bundles that are damaged, what witnesses and time stamp
        authorities signed.
        """

    def begin(self, name: str) -> Unpublished:
        """A new unpublished file that will be called ``name``."""

    def publish(self, files: Sequence[Unpublished]) -> None:
        """Flush, fsync and name all ``files``, then fsync the folders: durable on return.

        One call costs one folder sync for each folder, however many files. A failed fsync is final: the files are
        discarded, nothing is retried.

        Raises:
            CommitConflictError: one of the names exists. Names before it in ``files`` may have been published; what is
                not published is discarded.
            InternalError: kind ``not_open``; a file of another store, or one published or discarded before.
        """

    def delete(self, name: str) -> None:
        """Remove a name; one that is not there is no error. Durability may lag: deletion is repeated by the next gc."""

    def sweep_unpublished(self, older_than_s: float) -> int:
        """Remove unpublished files of dead writers; how many there were.

        A file whose writer is known to live stays; one whose writer is known to be dead goes; one of which nothing is
        known goes when it is older than this many seconds.
        """

    def now_s(self) -> float:
        """The store's clock, comparable to ``Listed.modified_s``."""

    def lock(self) -> AbstractContextManager[None]:
        """An advisory lock for derived files (tiles, log head): an optimisation, never what correctness rests on."""

    def close(self) -> None:
        """Give back descriptors. Idempotent."""
