"""Encoded chunks become segments: files that nobody sees until the commit publishes them.

    append -> header, padding, payload -> file (native direct I/O where there are descriptors) -> finish -> commit

The layout is that of ``reference.py``; only the way to the disk differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ciuic_async import native
from ciuic_async.errors import CiuicError, InternalError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import Buffer, hasher
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.segment import IndexEntry
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import WRITE, WriteOptions
from ciuic_async.segments.reference import index_entry
from ciuic_async.stores.advice import store_error
from ciuic_async.stores.base import Store, Unpublished


@dataclass(frozen=True, slots=True)
class FinishedSegments:
    """What a commit needs: files to publish, where each chunk lies, and the next unused segment number."""

    files: tuple[Unpublished, ...]
    locations: dict[bytes, ChunkLocation]
    size_bytes: int
    next_number: int
    busy_s: float = 0.0
    """How long the disk was kept writing; 0 where nobody measured it."""


class SegmentWriter:
    """Writes one rank's chunks of one snapshot. Belongs to one thread at a time.

    After an error only ``abort`` helps: every other call raises that error again. Files whose writer is neither
    finished nor aborted are dropped with it.

    Args:
        store: where the segments will be published.
        snapshot: its id.
        rank: whose chunks these are.
        first_number: of the first segment; numbers of one snapshot and rank are used once.
        borrows: payloads stay where they are until ``drain``, ``finish`` or ``abort`` returned: what lies at whole
            blocks of memory is then written from there. Else they are copied, and may be reused at once.
        options: sizes.
    """

    def __init__(
        self,
        store: Store,
        snapshot: str,
        rank: int = 0,
        *,
        first_number: int = 0,
        borrows: bool = False,
        options: WriteOptions = WRITE,
    ) -> None:
        self._store = store
        self._snapshot = snapshot
        self._rank = rank
        self._number = first_number
        self._borrows = borrows
        self._options = options
        self._busy_s = 0.0
        self._current: _OpenSegment | None = None
        self._files: list[Unpublished] = []
        self._locations: dict[bytes, ChunkLocation] = {}
        self._size_bytes = 0
        self._failure: CiuicError | None = None
        self._ended = False

    def append(self, chunk: EncodedChunk) -> None:
        """Add one record. On return its buffers may be reused, unless this writer borrows them.

        Raises:
            StoreError: ``kind`` is the errno in lower case, e.g. ``enospc``.
        """
        self._check_usable()
        stored = sum(memoryview(piece).nbytes for piece in chunk.payload)
        if stored != chunk.header.stored_size_bytes:
            raise InternalError(
                f"chunk {chunk.header.digest.hex()[:16]}: a payload of {stored} bytes, its header says "
                f"{chunk.header.stored_size_bytes}"
            )
        with self._failing_for_good():
            current = self._current
            if current is not None and current.would_exceed(chunk, self._options.segment_size_bytes):
                self._close_current()
                current = None
            if current is None:
                current = self._current = self._open_next()
            current.append(chunk, self._borrows)

    def drain(self) -> None:
        """Return when nothing borrowed is needed any more. Raises StoreError like ``append``."""
        self._check_usable()
        with self._failing_for_good():
            if self._current is not None:
                self._current.drain()

    def finish(self) -> FinishedSegments:
        """Complete the last segment. Nothing is published or synced: that is the commit's part. Called once.

        Raises:
            StoreError: like ``append``; also for writes that were still under way.
        """
        self._check_usable()
        with self._failing_for_good():
            self._close_current()
        self._ended = True
        return FinishedSegments(
            tuple(self._files), dict(self._locations), self._size_bytes, self._number, busy_s=self._busy_s
        )

    def abort(self) -> None:
        """Drop all files that are not published. Never raises; idempotent; also allowed after ``finish``."""
        self._ended = True
        current, self._current = self._current, None
        if current is not None:
            current.discard()
        for file in self._files:
            file.discard()

    def __del__(self) -> None:
        # Finished files belong to the caller; what is still open has no owner any more.
        current = getattr(self, "_current", None)
        if current is not None:
            with suppress(Exception):
                self.abort()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise InternalError("a segment writer was used after finish or abort", kind="not_open")

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """Whatever interrupts a write leaves half a record behind: remember it."""
        try:
            yield
        except CiuicError as error:
            self._failure = error
            raise
        except BaseException as error:
            self._failure = InternalError(f"an earlier write was interrupted: {error!r}", kind="interrupted")
            raise

    def _open_next(self) -> _OpenSegment:
        name = layout.segment(self._snapshot, self._rank, self._number)
        file = self._store.begin(name)
        try:
            opened = _OpenSegment(file, _output(self._store, file, self._options))
        except BaseException:
            file.discard()
            raise
        try:
            opened.write(segment.pack_file_header(self._snapshot, self._rank, self._number))
        except BaseException:
            opened.discard()
            raise
        self._number += 1
        return opened

    def _close_current(self) -> None:
        current = self._current
        if current is None:
            return
        reference = current.complete()
        self._current = None
        self._busy_s += current.busy_s
        self._files.append(current.file)
        self._size_bytes += reference.size_bytes
        for entry, depth in zip(current.entries, current.depths, strict=True):
            location = ChunkLocation(reference, entry.offset_bytes, entry.record_size_bytes, entry.codec, depth)
            self._locations.setdefault(entry.digest, location)


class _OpenSegment:
    """One segment while it grows: its position, its index and the digest of its bytes so far."""

    def __init__(self, file: Unpublished, output: _Output) -> None:
        self.file = file
        self.entries: list[IndexEntry] = []
        self.depths: list[int] = []  # of the same records; the index does not hold them
        self._output = output
        self._hasher = hasher()
        self._position = 0

    def would_exceed(self, chunk: EncodedChunk, limit_bytes: int) -> bool:
        """Whether a record more, besides those that are there, makes the file too long."""
        return bool(self.entries) and self._offset_of(chunk) + chunk.header.record_size_bytes > limit_bytes

    @property
    def busy_s(self) -> float:
        return self._output.busy_s

    def append(self, chunk: EncodedChunk, borrows: bool) -> None:
        offset = self._offset_of(chunk)
        self.write(bytes(offset - self._position) + chunk.header.pack())
        raw = chunk.header.codec == segment.CODEC_RAW
        for piece in chunk.payload:
            if not segment.leaves_out(segment.VERSION, chunk.header.codec):
                self._hasher.update(piece)
            self._put(piece, lend=borrows and raw)
        self.entries.append(index_entry(chunk, offset))
        self.depths.append(chunk.header.depth)

    def write(self, data: Buffer) -> None:
        self._hasher.update(data)
        self._put(data)

    def _put(self, data: Buffer, *, lend: bool = False) -> None:
        if lend:
            self._output.lend(data)
        else:
            self._output.write(data)
        self._position += memoryview(data).nbytes

    def drain(self) -> None:
        self._output.drain()

    def complete(self) -> SegmentReference:
        self.write(segment.pack_tail(self._position, self.entries))
        digest = self._hasher.digest()
        self.write(digest)
        self._output.finish()
        return SegmentReference(self.file.name, self._position, digest)

    def discard(self) -> None:
        self._output.abort()
        self.file.discard()

    def _offset_of(self, chunk: EncodedChunk) -> int:
        header = chunk.header
        return segment.record_offset(self._position, header.size_bytes, header.codec, header.raw_size_bytes)


class _Output(Protocol):
    """How bytes get into an unpublished file, in order. All but ``abort`` raise StoreError."""

    @property
    def busy_s(self) -> float: ...

    def write(self, data: Buffer) -> None: ...

    def lend(self, data: Buffer) -> None:
        """``write`` that may use ``data`` until ``drain``, ``finish`` or ``abort`` returned."""

    def drain(self) -> None: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


def _output(store: Store, file: Unpublished, options: WriteOptions) -> _Output:
    if native.core is None or not store.capabilities.file_descriptors:
        return _PlainOutput(file)
    try:
        return _NativeOutput(native.core.DirectWriter, f"{store.url}/{file.name}", file, options)
    except RuntimeError:  # no thread to be had: a slower snapshot is better than none
        return _PlainOutput(file)


class _PlainOutput:
    """Through the store's own ``write``."""

    def __init__(self, file: Unpublished) -> None:
        self._file = file
        self.busy_s = 0.0

    def write(self, data: Buffer) -> None:
        started = time.perf_counter()
        self._file.write(data)
        self.busy_s += time.perf_counter() - started

    def lend(self, data: Buffer) -> None:
        self.write(data)

    def drain(self) -> None:
        pass

    def finish(self) -> None:
        self._file.filled()

    def abort(self) -> None:
        pass


class _NativeOutput:
    """Through the native writer's own thread, past the page cache."""

    def __init__(self, writer_type: Any, place: str, file: Unpublished, options: WriteOptions) -> None:
        self._place = place
        self._name = file.name
        self._file = file  # keeps the descriptor open as long as the thread uses it
        self._lent: list[Buffer] = []
        self._writer = writer_type(file.fileno(), options.buffer_size_bytes, options.queue_depth, 0)

    @property
    def busy_s(self) -> float:
        return float(self._writer.busy_s)

    def write(self, data: Buffer) -> None:
        with self._naming_the_file():
            self._writer.append(data)

    def lend(self, data: Buffer) -> None:
        self._lent.append(data)  # alive, with its memory, for as long as the thread may read it
        with self._naming_the_file():
            self._writer.lend(data)

    def drain(self) -> None:
        with self._naming_the_file():
            self._writer.drain()
        self._lent.clear()

    def finish(self) -> None:
        with self._naming_the_file():
            self._writer.finish()
        self._lent.clear()

    def abort(self) -> None:
        self._writer.abort()
        self._lent.clear()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(self._place, self._name, error.errno or 0) from error
