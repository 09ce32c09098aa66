"""Chunks back from segments. What is read is hostile until a digest says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format import segment
from ciuic_async.format.digest import digest as blake3_256
from ciuic_async.format.locator import ChunkLocation
from ciuic_async.format.segment import RecordHeader
from ciuic_async.handoffs import Decoder
from ciuic_async.options import READ
from ciuic_async.segments.open_segments import OpenSegments
from ciuic_async.segments.reading import missing, parse_header, read_into
from ciuic_async.segments.scratch import ThreadMemory
from ciuic_async.stores.base import DirectReads, Store

BaseLookup = Callable[[bytes], tuple[int, ChunkLocation] | None]
"""Digest of a delta's base -> its raw size in bytes and where it lies; None: nobody says where."""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """One chunk: what the manifest says it is, and where a locator, which nobody signed, says it lies."""

    digest: bytes
    raw_size_bytes: int
    location: ChunkLocation

    @property
    def end_bytes(self) -> int:
        """Where its record ends in the segment."""
        return self.location.offset_bytes + self.location.record_size_bytes


class SegmentReader:
    """Reads chunks by location. May be used by several threads at once; each has buffers of its own.

    Segments stay open from chunk to chunk (at most ``READ.open_segments``) until ``close``, or the end of a ``with``.
    A thread's buffers hold what it reads at once and a decoded chunk; where deltas are read, at most one record more
    for each level, and one more chunk.

    Args:
        store: where the segments are.
        decode: the way back from records (``codecs.decode``).
        verify: check every chunk against its digest. Without it damage goes unnoticed.
        bases: where the bases of deltas lie. None: nowhere.
        direct: read past the page cache where the store can. Not for what was read a moment ago.
    """

    def __init__(
        self,
        store: Store,
        decode: Decoder,
        *,
        verify: bool = True,
        bases: BaseLookup | None = None,
        direct: bool = True,
    ) -> None:
        self._store = store
        self._decode = decode
        self._verify = verify
        self._bases = bases
        self._files = OpenSegments(store, READ.open_segments) if direct and isinstance(store, DirectReads) else None
        self._memory = ThreadMemory()

    def close(self) -> None:
        """Close the segments; no thread may be reading. What was returned keeps its memory. Idempotent."""
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> SegmentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_chunk(self, digest: bytes, raw_size_bytes: int, location: ChunkLocation) -> memoryview:
        """The raw bytes of one chunk; the arguments are those of a ``ChunkRequest``.

        Returns:
            A view of this thread's buffers: valid until the next call on the same thread.

        Raises:
            IntegrityError: ``where`` is the segment. Kinds: ``missing``, ``truncated``, ``bad_segment``,
                ``checksum_mismatch``, ``wrong_record``, ``bad_payload``, ``digest_mismatch``, ``missing_base``,
                ``bad_base``.
            FormatVersionError, StoreError.
        """
        request = ChunkRequest(digest, raw_size_bytes, location)
        _check_size(request)
        return self._verified(request, self._record(request, 0))

    def read_run(self, requests: Sequence[ChunkRequest]) -> Iterator[memoryview]:
        """The raw bytes of chunks that lie in this order, near each other, in one segment: read in one go.

        The caller bounds how far apart the first and the last are: all of it is in memory.

        Yields:
            One chunk after the other, each valid until the next; each raises for itself, as ``read_chunk`` does.
        """
        if self._files is None or len(requests) <= 1:
            for request in requests:
                yield self.read_chunk(request.digest, request.raw_size_bytes, request.location)
            return
        start, end = requests[0].location.offset_bytes, requests[-1].end_bytes
        data = self._read(self._files, requests[0].location.segment.path, start, end - start, 0)
        for request in requests:
            _check_size(request)
            at = request.location.offset_bytes - start
            record = data[at : at + request.location.record_size_bytes]
            if len(record) < request.location.record_size_bytes:
                raise _truncated(request, start + len(data))
            yield self._verified(request, record)

    def _verified(self, request: ChunkRequest, record: memoryview) -> memoryview:
        raw, header = self._raw(request, record, 0, check_bases=False)
        if self._verify and blake3_256(raw) != request.digest:
            if header.depth:
                self._raw(request, record, 0, check_bases=True)  # a base that was changed says so itself
            raise _changed(request)
        return raw

    def _raw(
        self, request: ChunkRequest, record: memoryview, level: int, *, check_bases: bool
    ) -> tuple[memoryview, RecordHeader]:
        """Decode a record. ``level`` counts from the chunk that was asked for down to the base of all bases."""
        header = _matching_header(request, record)
        payload = record[header.size_bytes :]
        if header.codec == segment.CODEC_RAW:
            return payload, header
        base = self._base(request, header, level + 1, check=check_bases) if header.depth else None
        # A level needs the raw bytes of the one below and no others: two buffers take turns.
        raw = self._memory.take(-1 - level % 2, header.raw_size_bytes)
        try:
            self._decode(header, payload, raw, base)
        except IntegrityError as error:
            path = request.location.segment.path
            raise IntegrityError(f"{_what(request)}: {error}", kind=error.kind, where=path) from error
        return raw, header

    def _base(self, request: ChunkRequest, header: RecordHeader, level: int, *, check: bool) -> memoryview:
        """The raw bytes of a delta's base. Depths fall by one from level to level, so this ends.

        Bases are not checked on the way: a wrong one makes a wrong chunk, and that is checked.
        """
        path = request.location.segment.path
        found = self._bases(header.base) if self._bases is not None else None
        if found is None:
            raise IntegrityError(
                f"{_what(request)}: is a delta to chunk {header.base.hex()[:16]}, and no locator says where that lies",
                kind="missing_base",
                where=path,
            )
        below = ChunkRequest(header.base, *found)
        if below.location.depth != header.depth - 1 or header.depth > segment.MAX_DEPTH:
            raise IntegrityError(
                f"{_what(request)}: a delta of depth {header.depth} to a base of depth {below.location.depth}, "
                f"expected one less, and at most {segment.MAX_DEPTH} deltas",
                kind="bad_base",
                where=path,
            )
        _check_size(below)
        raw, _ = self._raw(below, self._record(below, level), level, check_bases=check)
        if check and blake3_256(raw) != below.digest:
            raise _changed(below)
        return raw

    def _record(self, request: ChunkRequest, level: int) -> memoryview:
        location = request.location
        path, offset, size = location.segment.path, location.offset_bytes, location.record_size_bytes
        if self._files is None:
            record = self._memory.take(level, size)
            read_into(self._store, path, offset, record)
            return record
        record = self._read(self._files, path, offset, size, level)
        if len(record) < size:
            raise _truncated(request, offset + len(record))
        return record

    def _read(self, files: OpenSegments, path: str, offset_bytes: int, size_bytes: int, level: int) -> memoryview:
        """Bytes of a segment, fewer where it ends, out of the whole blocks around them."""
        before = offset_bytes % segment.DIRECT_ALIGNMENT_BYTES
        span = segment.align_up(before + size_bytes, segment.DIRECT_ALIGNMENT_BYTES)
        blocks = self._memory.take(level, span)
        try:
            with files.lease(path) as file:
                count = file.read_aligned(offset_bytes - before, blocks)
        except NotFoundError as error:
            raise missing(path) from error
        return blocks[before : max(before, min(before + size_bytes, count))]


def _check_size(request: ChunkRequest) -> None:
    """Bounds the memory that a lie can ask for."""
    raw_size, size = request.raw_size_bytes, request.location.record_size_bytes
    limit = segment.MAX_RECORD_HEADER_BYTES + segment.stored_limit_bytes(raw_size)
    if raw_size > segment.MAX_CHUNK_BYTES or not segment.RECORD_HEADER_BYTES <= size <= limit:
        raise IntegrityError(
            f"{_what(request)}: a record of {size} bytes for {raw_size}, expected at most {limit}",
            kind="wrong_record",
            where=request.location.segment.path,
        )


def _matching_header(request: ChunkRequest, record: memoryview) -> RecordHeader:
    """The header of a record, which has to be the one that was asked for."""
    location = request.location
    header = parse_header(record, location.offset_bytes, location.segment.path)
    found = (header.digest, header.raw_size_bytes, header.record_size_bytes, header.codec, header.depth)
    size = location.record_size_bytes
    if found != (request.digest, request.raw_size_bytes, size, location.codec, location.depth):
        raise IntegrityError(
            f"{_what(request)}: holds chunk {header.digest.hex()[:16]} ({header.raw_size_bytes} bytes in a record of "
            f"{header.record_size_bytes}, codec {header.codec}, depth {header.depth}), expected "
            f"{request.digest.hex()[:16]} ({request.raw_size_bytes} bytes in a record of {size}, "
            f"codec {location.codec}, depth {location.depth})",
            kind="wrong_record",
            where=location.segment.path,
        )
    return header


def _what(request: ChunkRequest) -> str:
    return f"{request.location.segment.path}, record at {request.location.offset_bytes}"


def _changed(request: ChunkRequest) -> IntegrityError:
    return IntegrityError(
        f"{_what(request)}: chunk {request.digest.hex()[:16]} does not match its digest: the bytes were changed",
        kind="digest_mismatch",
        where=request.location.segment.path,
    )


def _truncated(request: ChunkRequest, end_bytes: int) -> IntegrityError:
    return IntegrityError(
        f"{_what(request)}: the segment ends at byte {end_bytes}, expected at least {request.end_bytes}: truncated",
        kind="truncated",
        where=request.location.segment.path,
    )
