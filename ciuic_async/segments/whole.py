"""Whole segments: every byte checked, or every record found that is still there. What is read is hostile."""

from __future__ import annotations

from collections.abc import Callable

from ciuic_async.errors import CiuicError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, hasher
from ciuic_async.format.locator import SegmentReference
from ciuic_async.format.segment import IndexEntry, RecordHeader, Trailer
from ciuic_async.segments.reading import bad, missing, parse_header, read_into
from ciuic_async.stores.base import Store

_WINDOW_BYTES = 4 << 20
"""What a check reads at once: its memory, besides the index."""


def check_segment(store: Store, reference: SegmentReference) -> list[IndexEntry]:
    """Read a whole segment and check every byte of it: length, headers, index, padding, trailer and digest.

    Raw payloads are checked against their chunk's digest; encoded ones are not decoded: the digest at the end covers
    them. Memory: one window, and the index.

    Returns:
        The index, in file order.

    Raises:
        IntegrityError, FormatVersionError: ``where`` is the segment.
    """
    path = reference.path
    trailer = _read_trailer(store, reference)
    entries = _read_index(store, path, trailer)
    window = _Window(store, path, trailer.file_size_bytes - DIGEST_SIZE_BYTES)
    version = _check_file_header(window.take(segment.FILE_HEADER_BYTES), path)
    for entry in entries:
        _check_record(window, entry, path, leaves_out=segment.leaves_out(version, entry.codec))
    _check_zero(window, trailer.index_offset_bytes, path)
    if window.digest_of_all() != trailer.digest:
        raise bad(path, "does not match the digest at its end: bytes were changed", "digest_mismatch")
    if trailer.digest != reference.digest:
        raise bad(path, "is another segment than the locator refers to", "digest_mismatch")
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
        raise missing(path)
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
    """Forward through the first ``size_bytes`` of a file, digesting what is taken or skipped."""

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
        self._hasher.update(data)
        self.position_bytes += count
        return data

    def peek(self, count: int) -> memoryview:
        """Like ``take``, staying there and digesting nothing."""
        self._check_inside(self.position_bytes + count)
        at = self.position_bytes - self._start
        while len(self._data) - at < count:
            self._load(keep_from=min(at, len(self._data)))
            at = self.position_bytes - self._start
        return self._data[at : at + count]

    def skip_to(self, position_bytes: int) -> None:
        """Move forward, digesting what is passed over."""
        self._feed(self._hasher.update, position_bytes)

    def digest_until(self, position_bytes: int) -> bytes:
        """Move forward; BLAKE3 of what is passed over, which is left out of ``digest_of_all``."""
        own = hasher()
        self._feed(own.update, position_bytes)
        return own.digest()

    def digest_of_all(self) -> bytes:
        """BLAKE3 of all ``size_bytes`` but what was left out; moves to their end."""
        self.skip_to(self._size_bytes)
        return self._hasher.digest()

    def _feed(self, update: Callable[[memoryview], object], end_bytes: int) -> None:
        self._check_inside(end_bytes)
        while self.position_bytes < end_bytes:
            if self._start + len(self._data) == self.position_bytes:
                self._load(keep_from=len(self._data))
            at = self.position_bytes - self._start
            piece = self._data[at : at + end_bytes - self.position_bytes]
            update(piece)
            self.position_bytes += len(piece)

    def _check_inside(self, end_bytes: int) -> None:
        if not self.position_bytes <= end_bytes <= self._size_bytes:
            raise bad(self._path, f"no bytes {self.position_bytes} to {end_bytes}, it has {self._size_bytes}")

    def _load(self, keep_from: int) -> None:
        kept = self._data[keep_from:]
        self._start += keep_from
        end = self._start + len(kept)
        count = min(_WINDOW_BYTES, self._size_bytes - end)
        following = memoryview(bytearray(len(kept) + count))
        following[: len(kept)] = kept
        read_into(self._store, self._path, end, following[len(kept) :])
        self._data = following


def _read_trailer(store: Store, reference: SegmentReference) -> Trailer:
    path = reference.path
    size = store.size(path)
    if size is None:
        raise missing(path)
    if size != reference.size_bytes:
        raise bad(path, f"{size} bytes, expected {reference.size_bytes}", "wrong_size")
    if size < segment.FILE_HEADER_BYTES + segment.INDEX_HEADER_BYTES + segment.TRAILER_BYTES:
        raise bad(path, f"segment of {size} bytes is too short")
    data = bytearray(segment.TRAILER_BYTES)
    read_into(store, path, size - segment.TRAILER_BYTES, memoryview(data))
    return segment.parse_trailer(data, size, path)


def _read_index(store: Store, path: str, trailer: Trailer) -> list[IndexEntry]:
    if trailer.count * segment.RECORD_HEADER_BYTES > trailer.index_offset_bytes:  # bounds the memory that a lie can ask
        raise bad(path, f"{trailer.count} records do not fit before {trailer.index_offset_bytes}")
    size = trailer.file_size_bytes - segment.TRAILER_BYTES - trailer.index_offset_bytes
    data = bytearray(size)
    read_into(store, path, trailer.index_offset_bytes, memoryview(data))
    return segment.parse_index(data, trailer, path)


def _check_file_header(data: memoryview, path: str) -> int:
    """The segment's version."""
    header = segment.parse_file_header(data, path)
    if layout.segment(header.snapshot, header.rank, header.number) != path:
        owner = f"segment {header.number} of rank {header.rank} of snapshot {header.snapshot}"
        raise bad(path, f"header names {owner}", "wrong_segment")
    return header.version


def _check_record(window: _Window, entry: IndexEntry, path: str, *, leaves_out: bool) -> None:
    before = window.position_bytes
    _check_zero(window, entry.offset_bytes, path)
    data = window.peek(min(segment.MAX_RECORD_HEADER_BYTES, entry.record_size_bytes))
    header = parse_header(data, entry.offset_bytes, path)
    if segment.record_offset(before, header.size_bytes, header.codec, header.raw_size_bytes) != entry.offset_bytes:
        raise bad(path, f"the record after {before} lies at {entry.offset_bytes}, where no writer puts it")
    found = IndexEntry(header.digest, entry.offset_bytes, header.record_size_bytes, header.raw_size_bytes, header.codec)
    if found != entry:
        raise bad(path, f"the index and the record at {entry.offset_bytes} disagree")
    end = entry.offset_bytes + entry.record_size_bytes
    if not leaves_out:
        window.skip_to(end)
        return
    window.take(header.size_bytes)
    if window.digest_until(end) != header.digest:
        what = f"the record at {entry.offset_bytes}: chunk {header.digest.hex()[:16]}"
        raise bad(path, f"{what} does not match its digest: bytes were changed", "digest_mismatch")


def _check_zero(window: _Window, end_bytes: int, path: str) -> None:
    """The padding up to ``end_bytes`` is short, or something is wrong."""
    count = end_bytes - window.position_bytes
    if not 0 <= count < segment.DIRECT_ALIGNMENT_BYTES:
        raise bad(path, f"{count} bytes between {window.position_bytes} and what follows it")
    if any(window.take(count)):
        raise bad(path, f"padding before {end_bytes} is not zero")


def _record_here(data: memoryview, path: str) -> RecordHeader | None:
    try:
        return segment.parse_record_header(data, path)
    except CiuicError:
        return None
