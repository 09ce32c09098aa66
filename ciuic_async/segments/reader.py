"""Chunks back from segments, and checks of whole segments. What is read is hostile until a digest says otherwise."""

from __future__ import annotations

import threading

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, hasher
from ciuic_async.format.digest import digest as blake3_256
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.segment import IndexEntry, RecordHeader, Trailer
from ciuic_async.handoffs import Decoder
from ciuic_async.stores.base import Store

_WINDOW_BYTES = 4 << 20
"""What a check of a whole segment reads at once: its memory, besides the index."""


class _Scratch(threading.local):
    """Two buffers of one thread, kept from call to call because fresh memory is slow."""

    def __init__(self) -> None:
        self.record = bytearray()
        self.raw = bytearray()


class SegmentReader:
    """Reads chunks by location. May be used by several threads at once; each has buffers of its own.

    Args:
        store: where the segments are.
        verify: check every chunk against its digest. Without it damage goes unnoticed.
        decode: the way back from records (``codecs.decode``).
    """

    def __init__(self, store: Store, decode: Decoder, *, verify: bool = True) -> None:
        self._store = store
        self._decode = decode
        self._verify = verify
        self._scratch = _Scratch()

    def read_chunk(self, digest: bytes, raw_size_bytes: int, location: ChunkLocation) -> memoryview:
        """The raw bytes of one chunk.

        Args:
            digest: what the manifest says the chunk is.
            raw_size_bytes: likewise.
            location: where a locator, which nobody signed, says it lies.

        Returns:
            A view of this thread's buffers: valid until the next call on the same thread.

        Raises:
            IntegrityError: ``where`` is the segment. Kinds: ``missing``, ``truncated``, ``bad_segment``,
                ``checksum_mismatch``, ``wrong_record``, ``bad_payload``, ``digest_mismatch``.
            FormatVersionError, StoreError.
        """
        path = location.segment.path
        what = f"{path}, record at {location.offset_bytes}"
        limit = segment.MAX_RECORD_HEADER_BYTES + segment.stored_limit_bytes(raw_size_bytes)
        size = location.record_size_bytes
        if raw_size_bytes > segment.MAX_CHUNK_BYTES or not segment.RECORD_HEADER_BYTES <= size <= limit:
            raise IntegrityError(
                f"{what}: a record of {size} bytes for {raw_size_bytes}, expected at most {limit}",
                kind="wrong_record",
                where=path,
            )
        if len(self._scratch.record) < size:
            self._scratch.record = bytearray(size)
        record = memoryview(self._scratch.record)[:size]
        _read_into(self._store, path, location.offset_bytes, record)
        header = _parse_header(record, location.offset_bytes, path)
        found = (header.digest, header.raw_size_bytes, header.record_size_bytes, header.codec, header.depth)
        expected = (digest, raw_size_bytes, size, location.codec, location.depth)
        if found != expected:
            raise IntegrityError(
                f"{what}: holds chunk {header.digest.hex()[:16]} ({header.raw_size_bytes} bytes in a record of "
                f"{header.record_size_bytes}, codec {header.codec}), expected {digest.hex()[:16]} ({raw_size_bytes} "
                f"bytes in a record of {size}, codec {location.codec})",
                kind="wrong_record",
                where=path,
            )
        payload = record[header.size_bytes :]
        raw = payload if header.codec == segment.CODEC_RAW else self._decoded(header, payload, what, path)
        if self._verify and blake3_256(raw) != digest:
            raise IntegrityError(
                f"{what}: chunk {digest.hex()[:16]} does not match its digest: the bytes were changed",
                kind="digest_mismatch",
                where=path,
            )
        return raw

    def _decoded(self, header: RecordHeader, payload: memoryview, what: str, path: str) -> memoryview:
        if len(self._scratch.raw) < header.raw_size_bytes:
            self._scratch.raw = bytearray(header.raw_size_bytes)
        raw = memoryview(self._scratch.raw)[: header.raw_size_bytes]
        try:
            self._decode(header, payload, raw)
        except IntegrityError as error:
            raise IntegrityError(f"{what}: {error}", kind=error.kind, where=path) from error
        return raw


def check_segment(store: Store, reference: SegmentReference) -> list[IndexEntry]:
    """Read a whole segment and check every byte of it: length, headers, index, padding, trailer and digest.

    Chunks are not decoded: the digest at the end covers their payloads. Memory: one window, and the index.

    Returns:
        The index, in file order.

    Raises:
        IntegrityError, FormatVersionError: ``where`` is the segment.
    """
    path = reference.path
    trailer = _read_trailer(store, reference)
    entries = _read_index(store, path, trailer)
    window = _Window(store, path, trailer.file_size_bytes - DIGEST_SIZE_BYTES)
    _check_file_header(window.take(segment.FILE_HEADER_BYTES), path)
    for entry in entries:
        _check_record(window, entry, path)
    _check_zero(window, trailer.index_offset_bytes, path)
    if trailer.index_offset_bytes != window.position_bytes:
        raise _bad(path, f"records end at {window.position_bytes}, the index is at {trailer.index_offset_bytes}")
    if window.digest_of_all() != trailer.digest:
        raise _bad(path, "does not match the digest at its end: bytes were changed", "digest_mismatch")
    if trailer.digest != reference.digest:
        raise _bad(path, "is another segment than the locator refers to", "digest_mismatch")
    return entries


def scan_segment(store: Store, path: str) -> list[tuple[RecordHeader, int]]:
    """Every record that can still be found, with its offset, without help from the index.

    Where something is damaged the search goes on at every multiple of 64. What it finds there may be a payload that
    looks like a record: whoever uses a record checks its chunk's digest, as always.

    Raises:
        IntegrityError: kind ``missing``.
    """
    size = store.size(path)
    if size is None:
        raise _missing(path)
    window = _Window(store, path, size)
    position = segment.FILE_HEADER_BYTES
    found = []
    while position + segment.RECORD_HEADER_BYTES <= size:
        window.skip_to(position)
        data = window.peek(min(segment.MAX_RECORD_HEADER_BYTES, size - position))
        header = _record_here(data, path)
        if header is None or position + header.record_size_bytes > size:
            position += segment.ALIGNMENT_BYTES
            continue
        found.append((header, position))
        position = segment.align_up(position + header.record_size_bytes, segment.ALIGNMENT_BYTES)
    return found


class _Window:
    """Forward through the first ``size_bytes`` of a file, digesting all of them."""

    def __init__(self, store: Store, path: str, size_bytes: int) -> None:
        self._store = store
        self._path = path
        self._size_bytes = size_bytes
        self._hasher = hasher()
        self._data = memoryview(b"")
        self._start = 0  # of the data in the file
        self.position_bytes = 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes; valid until the next call. Raises IntegrityError where there are fewer."""
        data = self.peek(count)
        self.position_bytes += count
        return data

    def peek(self, count: int) -> memoryview:
        """Like ``take``, staying there."""
        self._check_inside(self.position_bytes + count)
        at = self.position_bytes - self._start
        while len(self._data) - at < count:
            self._load(keep_from=min(at, len(self._data)))
            at = self.position_bytes - self._start
        return self._data[at : at + count]

    def skip_to(self, position_bytes: int) -> None:
        """Move forward, digesting what is passed over."""
        self._check_inside(position_bytes)
        while self._start + len(self._data) < position_bytes:
            self._load(keep_from=len(self._data))
        self.position_bytes = position_bytes

    def digest_of_all(self) -> bytes:
        """BLAKE3 of all ``size_bytes``; moves to their end."""
        self.skip_to(self._size_bytes)
        return self._hasher.digest()

    def _check_inside(self, end_bytes: int) -> None:
        if not self.position_bytes <= end_bytes <= self._size_bytes:
            raise _bad(self._path, f"no bytes {self.position_bytes} to {end_bytes}, it has {self._size_bytes}")

    def _load(self, keep_from: int) -> None:
        kept = self._data[keep_from:]
        self._start += keep_from
        end = self._start + len(kept)
        count = min(_WINDOW_BYTES, self._size_bytes - end)
        following = memoryview(bytearray(len(kept) + count))
        following[: len(kept)] = kept
        _read_into(self._store, self._path, end, following[len(kept) :])
        self._hasher.update(following[len(kept) :])
        self._data = following


def _read_trailer(store: Store, reference: SegmentReference) -> Trailer:
    path = reference.path
    size = store.size(path)
    if size is None:
        raise _missing(path)
    if size != reference.size_bytes:
        raise _bad(path, f"{size} bytes, expected {reference.size_bytes}", "wrong_size")
    if size < segment.FILE_HEADER_BYTES + segment.INDEX_HEADER_BYTES + segment.TRAILER_BYTES:
        raise _bad(path, f"segment of {size} bytes is too short")
    data = bytearray(segment.TRAILER_BYTES)
    _read_into(store, path, size - segment.TRAILER_BYTES, memoryview(data))
    return segment.parse_trailer(data, size, path)


def _read_index(store: Store, path: str, trailer: Trailer) -> list[IndexEntry]:
    if trailer.count * segment.RECORD_HEADER_BYTES > trailer.index_offset_bytes:  # bounds the memory that a lie can ask
        raise _bad(path, f"{trailer.count} records do not fit before {trailer.index_offset_bytes}")
    size = trailer.file_size_bytes - segment.TRAILER_BYTES - trailer.index_offset_bytes
    data = bytearray(size)
    _read_into(store, path, trailer.index_offset_bytes, memoryview(data))
    return segment.parse_index(data, trailer, path)


def _check_file_header(data: memoryview, path: str) -> None:
    snapshot, rank, number = segment.parse_file_header(data, path)
    if layout.segment(snapshot, rank, number) != path:
        raise _bad(path, f"header names segment {number} of rank {rank} of snapshot {snapshot}", "wrong_segment")


def _check_record(window: _Window, entry: IndexEntry, path: str) -> None:
    before = window.position_bytes
    _check_zero(window, entry.offset_bytes, path)
    data = window.peek(min(segment.MAX_RECORD_HEADER_BYTES, entry.record_size_bytes))
    header = _parse_header(data, entry.offset_bytes, path)
    if segment.record_offset(before, header.size_bytes, header.codec, header.raw_size_bytes) != entry.offset_bytes:
        raise _bad(path, f"the record after {before} lies at {entry.offset_bytes}, where no writer puts it")
    found = IndexEntry(header.digest, entry.offset_bytes, header.record_size_bytes, header.raw_size_bytes, header.codec)
    if found != entry:
        raise _bad(path, f"the index and the record at {entry.offset_bytes} disagree")
    window.skip_to(entry.offset_bytes + entry.record_size_bytes)


def _check_zero(window: _Window, end_bytes: int, path: str) -> None:
    """The padding up to ``end_bytes`` is short, or something is wrong."""
    count = end_bytes - window.position_bytes
    if not 0 <= count < segment.DIRECT_ALIGNMENT_BYTES:
        raise _bad(path, f"{count} bytes between {window.position_bytes} and what follows it")
    if any(window.take(count)):
        raise _bad(path, f"padding before {end_bytes} is not zero")


def _record_here(data: memoryview, path: str) -> RecordHeader | None:
    try:
        return segment.parse_record_header(data, path)
    except CiuicError:
        return None


def _read_into(store: Store, path: str, offset_bytes: int, buffer: memoryview) -> None:
    try:
        store.read_into(path, offset_bytes, buffer)
    except NotFoundError as error:
        raise _missing(path) from error


def _parse_header(data: memoryview, offset_bytes: int, path: str) -> RecordHeader:
    """A record's header; errors name the segment as their place."""
    try:
        return segment.parse_record_header(data, f"{path}, record at {offset_bytes}")
    except CiuicError as error:
        raise type(error)(str(error), kind=error.kind, where=path) from error


def _missing(path: str) -> IntegrityError:
    return IntegrityError(f"{path}: the segment is missing", kind="missing", where=path)


def _bad(path: str, message: str, kind: str = "bad_segment") -> IntegrityError:
    return IntegrityError(f"{path}: {message}", kind=kind, where=path)
