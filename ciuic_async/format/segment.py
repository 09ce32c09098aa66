"""Byte layout of segments (docs/format.md, section 5): pack and parse, nothing else.

``csrc/segment_format.h`` holds the same constants; a test compares them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from ciuic_async.errors import FormatVersionError, IntegrityError
from ciuic_async.format import layout
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, ZERO_DIGEST, Buffer, digest

VERSION = 2
VERSIONS = (1, 2)  # that are read
ALIGNMENT_BYTES = 64
DIRECT_ALIGNMENT_BYTES = 4096
DIRECT_MINIMUM_BYTES = 1 << 20  # raw payloads of at least this many bytes are aligned for O_DIRECT
MAX_CHUNK_BYTES = 64 << 20
MAX_RECORDS = 1 << 32
ITEM_SIZES_BYTES = (1, 2, 4, 8, 16)

CODEC_RAW = 0
CODEC_PLANES = 1
CODEC_DELTA = 2
CODEC_ROTATED = 3
CODEC_NAMES = {CODEC_RAW: "raw", CODEC_PLANES: "planes", CODEC_DELTA: "delta", CODEC_ROTATED: "rotated"}
DELTA_XOR = 1
DELTA_DIFFERENCE = 2
WORD_SIZES_BYTES = (2, 4, 8)  # of items that are treated as integers: differences and rotation
MAX_DEPTH = 4  # deltas that a reader follows: bounds the reads and the memory of one chunk
ENCRYPTION_NONE = 0
PLANE_RAW = 0
PLANE_ZSTD = 1

_FILE_MAGIC = b"CIUICSEG"
_RECORD_MAGIC = b"CREC"
_INDEX_MAGIC = b"CIDX"
_END_MAGIC = b"CIUICEND"

_FILE_HEADER = struct.Struct("<8sHHI20sII20s")
_RECORD_HEADER = struct.Struct("<4sHBBQQ32s32sHBBiB23s8s")
_PLANE = struct.Struct("<B3sI")
_INDEX_HEADER = struct.Struct("<4s4sQ")
_INDEX_ENTRY = struct.Struct("<32sQQQB7s")
_TRAILER = struct.Struct("<QQQ8s32s")

FILE_HEADER_BYTES = _FILE_HEADER.size  # 64
RECORD_HEADER_BYTES = _RECORD_HEADER.size  # 128, without the plane directory
PLANE_ENTRY_BYTES = _PLANE.size  # 8
INDEX_HEADER_BYTES = _INDEX_HEADER.size  # 16
INDEX_ENTRY_BYTES = _INDEX_ENTRY.size  # 64
TRAILER_BYTES = _TRAILER.size  # 64
MAX_RECORD_HEADER_BYTES = RECORD_HEADER_BYTES + 16 * PLANE_ENTRY_BYTES  # 16 planes at most; already a multiple of 64


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` (a power of two) that is at least ``value``."""
    return (value + alignment - 1) & ~(alignment - 1)


def stored_limit_bytes(raw_size_bytes: int) -> int:
    """The most bytes a payload may have: no codec doubles its input, and a reader never allocates what a lie asks."""
    return 2 * raw_size_bytes + 4096


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of its payload.

    ``planes`` are pairs (method, stored size in bytes). ``base``, ``depth`` and ``method`` (``DELTA_XOR`` or
    ``DELTA_DIFFERENCE``) are of deltas only, else zero.
    """

    codec: int
    raw_size_bytes: int
    stored_size_bytes: int
    digest: bytes
    item_size_bytes: int = 1
    planes: tuple[tuple[int, int], ...] = ()
    parameter: int = 0
    base: bytes = ZERO_DIGEST
    depth: int = 0
    method: int = 0

    @property
    def size_bytes(self) -> int:
        """Length of the packed header: where the payload starts, from the record's offset."""
        return align_up(RECORD_HEADER_BYTES + PLANE_ENTRY_BYTES * len(self.planes), ALIGNMENT_BYTES)

    @property
    def record_size_bytes(self) -> int:
        return self.size_bytes + self.stored_size_bytes

    def pack(self) -> bytes:
        size = self.size_bytes
        fixed = (
            _RECORD_MAGIC,
            size,
            self.codec,
            ENCRYPTION_NONE,
            self.raw_size_bytes,
            self.stored_size_bytes,
            self.digest,
            self.base,
            self.depth,
            self.item_size_bytes,
            len(self.planes),
            self.parameter,
            self.method,
            bytes(23),
        )
        directory = b"".join(_PLANE.pack(method, bytes(3), stored) for method, stored in self.planes)
        body = directory.ljust(size - RECORD_HEADER_BYTES, b"\0")
        checksum = digest(_RECORD_HEADER.pack(*fixed, bytes(8)) + body)[:8]
        return _RECORD_HEADER.pack(*fixed, checksum) + body


def record_offset(position: int, header_size_bytes: int, codec: int, raw_size_bytes: int) -> int:
    """Where the next record starts, when the file is ``position`` bytes long."""
    if codec == CODEC_RAW and raw_size_bytes >= DIRECT_MINIMUM_BYTES:
        return align_up(position + header_size_bytes, DIRECT_ALIGNMENT_BYTES) - header_size_bytes
    return align_up(position, ALIGNMENT_BYTES)


def parse_record_header(data: Buffer, what: str) -> RecordHeader:
    """Parse and check the header at the start of ``data`` (all of a record, or at least its header).

    Raises:
        IntegrityError, FormatVersionError: naming ``what``.
    """
    view = memoryview(data)
    if len(view) < RECORD_HEADER_BYTES:
        raise _bad(what, f"record header of {len(view)} bytes, expected at least {RECORD_HEADER_BYTES}")
    magic, size, codec, encryption, raw, stored, chunk, base, *rest = _RECORD_HEADER.unpack_from(view)
    depth, item, planes, parameter, delta, zero, checksum = rest
    if magic != _RECORD_MAGIC:
        raise _bad(what, "no record starts here")
    if size != align_up(RECORD_HEADER_BYTES + PLANE_ENTRY_BYTES * planes, ALIGNMENT_BYTES) or len(view) < size:
        raise _bad(what, f"record header claims {size} bytes with {planes} planes")
    plain = bytearray(view[:size])
    plain[RECORD_HEADER_BYTES - 8 : RECORD_HEADER_BYTES] = bytes(8)
    if digest(plain)[:8] != checksum:
        raise _bad(what, "record header does not match its checksum", kind="checksum_mismatch")
    if codec not in CODEC_NAMES:
        raise FormatVersionError(
            f"{what}: unknown codec {codec}; upgrade ciuic-async", kind="unknown_codec", where=what
        )
    if encryption != ENCRYPTION_NONE:
        raise FormatVersionError(
            f"{what}: unknown encryption {encryption}; upgrade ciuic-async", kind="unknown_encryption", where=what
        )
    if any(zero) or any(plain[RECORD_HEADER_BYTES + PLANE_ENTRY_BYTES * planes :]):
        raise _bad(what, "reserved bytes of the record header are not zero")
    directory = []
    for number in range(planes):
        method, pad, plane_stored = _PLANE.unpack_from(view, RECORD_HEADER_BYTES + PLANE_ENTRY_BYTES * number)
        if any(pad):
            raise _bad(what, f"reserved bytes of plane {number} are not zero")
        directory.append((method, plane_stored))
    header = RecordHeader(codec, raw, stored, chunk, item, tuple(directory), parameter, base, depth, delta)
    _check_record(header, what)
    return header


def _check_record(header: RecordHeader, what: str) -> None:
    """Sizes that must agree, whatever wrote them."""
    if header.raw_size_bytes > MAX_CHUNK_BYTES:
        raise _bad(what, f"raw size of {header.raw_size_bytes} bytes, at most {MAX_CHUNK_BYTES} are allowed")
    if header.item_size_bytes not in ITEM_SIZES_BYTES or header.raw_size_bytes % header.item_size_bytes:
        raise _bad(what, f"{header.raw_size_bytes} bytes are no whole items of {header.item_size_bytes} bytes")
    if header.stored_size_bytes > stored_limit_bytes(header.raw_size_bytes):
        raise _bad(what, f"stores {header.stored_size_bytes} bytes for {header.raw_size_bytes}")
    _check_delta(header, what)
    if header.codec == CODEC_RAW:
        if header.planes or header.stored_size_bytes != header.raw_size_bytes:
            raise _bad(what, f"raw record stores {header.stored_size_bytes} bytes for {header.raw_size_bytes}")
        return
    if header.codec == CODEC_ROTATED and header.item_size_bytes not in WORD_SIZES_BYTES:
        raise _bad(what, f"items of {header.item_size_bytes} bytes cannot be rotated")
    if len(header.planes) != header.item_size_bytes:
        raise _bad(what, f"{len(header.planes)} planes for items of {header.item_size_bytes} bytes")
    plane_size = header.raw_size_bytes // header.item_size_bytes
    if sum(stored for _, stored in header.planes) != header.stored_size_bytes:
        raise _bad(what, f"planes do not add up to the stored size {header.stored_size_bytes}")
    for number, (method, stored) in enumerate(header.planes):
        if method == PLANE_RAW and stored != plane_size:
            raise _bad(what, f"raw plane {number} stores {stored} bytes, expected {plane_size}")
        if method not in (PLANE_RAW, PLANE_ZSTD):
            raise FormatVersionError(
                f"{what}: unknown plane method {method}; upgrade ciuic-async", kind="unknown_codec", where=what
            )


def _check_delta(header: RecordHeader, what: str) -> None:
    """What only deltas have, and what they must have."""
    if header.codec != CODEC_DELTA:
        if header.depth or header.base != ZERO_DIGEST or header.method:
            raise _bad(what, f"a {CODEC_NAMES[header.codec]} record has a delta base, a depth or a delta method")
        return
    if header.base in (ZERO_DIGEST, header.digest):
        raise _bad(what, "a delta without a base other than itself")
    if not 1 <= header.depth <= MAX_DEPTH:
        raise _bad(what, f"a delta of depth {header.depth}, expected 1 to {MAX_DEPTH}")
    if header.method not in (DELTA_XOR, DELTA_DIFFERENCE):
        raise FormatVersionError(
            f"{what}: unknown delta method {header.method}; upgrade ciuic-async", kind="unknown_codec", where=what
        )
    if header.method == DELTA_DIFFERENCE and header.item_size_bytes not in WORD_SIZES_BYTES:
        raise _bad(what, f"items of {header.item_size_bytes} bytes have no differences")


def pack_file_header(snapshot: str, rank: int, number: int, version: int = VERSION) -> bytes:
    """The first 64 bytes of a segment."""
    return _FILE_HEADER.pack(
        _FILE_MAGIC, version, 0, FILE_HEADER_BYTES, snapshot.encode("ascii"), rank, number, bytes(20)
    )


class FileHeader(NamedTuple):
    """Whose segment it is, and which of its version's rules hold."""

    snapshot: str
    rank: int
    number: int
    version: int


def parse_file_header(data: Buffer, what: str) -> FileHeader:
    """Parse and check the first 64 bytes of a segment."""
    if len(data) < FILE_HEADER_BYTES:
        raise _bad(what, f"segment of {len(data)} bytes, expected at least {FILE_HEADER_BYTES}")
    magic, version, zero, size, snapshot, rank, number, pad = _FILE_HEADER.unpack_from(data)
    if magic != _FILE_MAGIC:
        raise _bad(what, "not a segment")
    if version not in VERSIONS:
        raise FormatVersionError(f"{what}: segment version {version}, this version reads {VERSIONS}", where=what)
    snapshot_id = snapshot.decode("ascii", "replace")
    if zero or size != FILE_HEADER_BYTES or any(pad) or not layout.ID.fullmatch(snapshot_id):
        raise _bad(what, "segment header is malformed")
    return FileHeader(snapshot_id, rank, number, version)


def leaves_out(version: int, codec: int) -> bool:
    """Whether the digest at the end leaves a payload out: raw ones since version 2, for their header has their own."""
    return version >= 2 and codec == CODEC_RAW


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of a segment's index."""

    digest: bytes
    offset_bytes: int
    record_size_bytes: int
    raw_size_bytes: int
    codec: int


def pack_tail(position: int, entries: list[IndexEntry]) -> bytes:
    """Everything after the last record but the final digest: padding, index, padding, trailer without its digest.

    Args:
        position: length of the file so far (the end of the last record).
        entries: the records in file order.

    Returns:
        Bytes to append; appending the digest (32 bytes) of the file so far then completes the segment.
    """
    index_offset = align_up(position, ALIGNMENT_BYTES)
    index = [_INDEX_HEADER.pack(_INDEX_MAGIC, bytes(4), len(entries))]
    index += [
        _INDEX_ENTRY.pack(e.digest, e.offset_bytes, e.record_size_bytes, e.raw_size_bytes, e.codec, bytes(7))
        for e in entries
    ]
    body = b"".join(index)
    file_size = align_up(index_offset + len(body) + TRAILER_BYTES, DIRECT_ALIGNMENT_BYTES)
    trailer = _TRAILER.pack(index_offset, len(entries), file_size, _END_MAGIC, ZERO_DIGEST)[:-DIGEST_SIZE_BYTES]
    padding = file_size - TRAILER_BYTES - index_offset - len(body)
    return bytes(index_offset - position) + body + bytes(padding) + trailer


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 64 bytes of a segment."""

    index_offset_bytes: int
    count: int
    file_size_bytes: int
    digest: bytes


def parse_trailer(data: Buffer, file_size_bytes: int, what: str) -> Trailer:
    """Parse the last ``TRAILER_BYTES`` of a segment that is ``file_size_bytes`` long."""
    if len(data) != TRAILER_BYTES:
        raise _bad(what, f"segment of {file_size_bytes} bytes is too short")
    index_offset, count, size, magic, found = _TRAILER.unpack(data)
    if magic != _END_MAGIC:
        raise _bad(what, "segment does not end as a segment does: truncated or extended")
    if size != file_size_bytes or size % DIRECT_ALIGNMENT_BYTES:
        raise _bad(what, f"segment says it has {size} bytes, found {file_size_bytes}")
    end = index_offset + INDEX_HEADER_BYTES + INDEX_ENTRY_BYTES * count + TRAILER_BYTES
    misplaced = index_offset < FILE_HEADER_BYTES or index_offset % ALIGNMENT_BYTES
    if count > MAX_RECORDS or misplaced or align_up(end, DIRECT_ALIGNMENT_BYTES) != size:
        raise _bad(what, f"segment index at {index_offset} with {count} entries does not fit {size} bytes")
    return Trailer(index_offset, count, size, found)


def parse_index(data: Buffer, trailer: Trailer, what: str) -> list[IndexEntry]:
    """Parse the index: ``data`` is everything from the index's offset to the trailer."""
    view = memoryview(data)
    expected = trailer.file_size_bytes - TRAILER_BYTES - trailer.index_offset_bytes
    if len(view) != expected:
        raise _bad(what, f"segment index of {len(view)} bytes, expected {expected}")
    magic, zero, count = _INDEX_HEADER.unpack_from(view)
    if magic != _INDEX_MAGIC or any(zero) or count != trailer.count:
        raise _bad(what, "segment index is malformed")
    end = INDEX_HEADER_BYTES + INDEX_ENTRY_BYTES * count
    if any(view[end:]):
        raise _bad(what, "padding after the segment index is not zero")
    entries: list[IndexEntry] = []
    position = FILE_HEADER_BYTES
    for fields in _INDEX_ENTRY.iter_unpack(view[INDEX_HEADER_BYTES:end]):
        chunk, offset, record_size, raw_size, codec, pad = fields
        if any(pad) or offset % ALIGNMENT_BYTES or offset + record_size > trailer.index_offset_bytes:
            raise _bad(what, f"segment index refers to a record at {offset} of {record_size} bytes")
        if offset < position or record_size < RECORD_HEADER_BYTES or raw_size > MAX_CHUNK_BYTES:
            raise _bad(what, f"segment index: a record at {offset} of {record_size} bytes overlaps or is no record")
        if codec not in CODEC_NAMES:
            raise FormatVersionError(
                f"{what}: unknown codec {codec}; upgrade ciuic-async", kind="unknown_codec", where=what
            )
        position = offset + record_size
        entries.append(IndexEntry(chunk, offset, record_size, raw_size, codec))
    return entries


def _bad(what: str, message: str, kind: str = "bad_segment") -> IntegrityError:
    return IntegrityError(f"{what}: {message}", kind=kind, where=what)
