"""Segments and payloads that lie: every lie is a typed error, before memory is allocated for it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.codecs import planes, transform
from ciuic_async.codecs.base import Base
from ciuic_async.codecs.decode import decode
from ciuic_async.codecs.planes import Effort, PlanesCodec, encode_delta, native_core
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, digest
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.segment import PLANE_RAW, PLANE_ZSTD, RecordHeader
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.segments.reference import build_segment
from ciuic_async.segments.whole import check_segment, scan_segment
from ciuic_async.stores.memory import MemoryStore

SNAPSHOT = "0123456789abcdef0123"
PATH = layout.segment(SNAPSHOT, 0, 0)
CORES = [pytest.param(None, id="plain")]
if native_core() is not None:
    CORES.append(pytest.param(native_core(), id="native"))


def _chunk(raw: bytes, item_size: int = 1) -> EncodedChunk:
    return PlanesCodec().encode(memoryview(raw), digest(raw), item_size)


RAW = [b"first", bytes(700), b"\x01\x02\x03\x04" * 300]
SMALL = build_segment(SNAPSHOT, 0, 0, [_chunk(RAW[0]), _chunk(RAW[1]), _chunk(RAW[2], 4)])
OLD, NEW = b"\x01\x02\x80\x3f" * 2000, b"\x03\x02\x80\x3f" * 2000


def _delta(item_size: int) -> EncodedChunk:
    base = Base(memoryview(OLD), digest(OLD), 1)
    chunk = encode_delta(memoryview(NEW), digest(NEW), item_size, base, Effort(0, 0.08))
    assert chunk is not None
    return chunk


WITH_DELTA = build_segment(SNAPSHOT, 0, 0, [_delta(4), _chunk(OLD, 2)])


def _stored(content: bytes, path: str = PATH) -> tuple[MemoryStore, SegmentReference]:
    store = MemoryStore()
    store.create(path, content)
    return store, SegmentReference(path, len(content), content[-DIGEST_SIZE_BYTES:])


def _raw_payloads(content: bytes) -> list[tuple[int, int]]:
    """Where the payloads lie that the digest at the end leaves out."""
    trailer = segment.parse_trailer(content[-segment.TRAILER_BYTES :], len(content), PATH)
    index = segment.parse_index(content[trailer.index_offset_bytes : -segment.TRAILER_BYTES], trailer, PATH)
    ends = [(entry.offset_bytes + entry.record_size_bytes, entry) for entry in index]
    return [(end - entry.raw_size_bytes, end) for end, entry in ends if entry.codec == segment.CODEC_RAW]


LEFT_OUT = _raw_payloads(SMALL)


def _resealed(content: bytes | bytearray) -> bytes:
    """The file of a liar who can compute BLAKE3 too, made from ``SMALL``."""
    body = bytearray(content[:-DIGEST_SIZE_BYTES])
    digested = bytearray(body)
    for start, end in reversed(LEFT_OUT):
        del digested[start:end]
    return bytes(body + digest(digested))


def test_resealing_is_right() -> None:
    """What the lies below are sealed with is the digest that the check computes."""
    assert LEFT_OUT
    assert _resealed(SMALL) == SMALL


# --- whole segments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [SMALL, WITH_DELTA])
def test_every_flipped_byte_is_found(whole: bytes) -> None:
    """Whatever byte of a segment changes, the deep check fails with a typed error that names the segment."""
    check_segment(*_stored(whole))
    reference = SegmentReference(PATH, len(whole), whole[-DIGEST_SIZE_BYTES:])
    missed = []
    places = set()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x20
        store, _ = _stored(bytes(changed))
        try:
            check_segment(store, reference)
        except (IntegrityError, FormatVersionError) as error:
            places.add(error.where)
        else:
            missed.append(at)
    assert not missed
    assert places == {PATH}


def test_other_lengths_are_found() -> None:
    """Truncated or extended by any number of bytes, with the right or an adjusted reference."""
    for length in [0, 1, 63, 64, 143, *range(100, len(SMALL), 97), len(SMALL) - 1]:
        for content in (SMALL[:length], SMALL + SMALL[:length] if length else SMALL + b"\0"):
            store, adjusted = _stored(content)
            for reference in (adjusted, SegmentReference(PATH, len(SMALL), SMALL[-DIGEST_SIZE_BYTES:])):
                with pytest.raises(IntegrityError):
                    check_segment(store, reference)


def test_segment_under_another_name_is_found() -> None:
    """The header names the file: swapped files do not pass, even where the digest is right."""
    with pytest.raises(IntegrityError) as caught:
        check_segment(*_stored(SMALL, layout.segment(SNAPSHOT, 0, 1)))
    assert caught.value.kind == "wrong_segment"


def test_intact_segment_that_is_another_one_is_found() -> None:
    """A locator refers to one segment by its digest."""
    store, _ = _stored(SMALL)
    with pytest.raises(IntegrityError) as caught:
        check_segment(store, SegmentReference(PATH, len(SMALL), digest(b"another")))
    assert caught.value.kind == "digest_mismatch"


def _set(at: int, new: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[at : at + len(new)] = new

    return change


_TRAILER = len(SMALL) - segment.TRAILER_BYTES
(_INDEX,) = struct.unpack_from("<Q", SMALL, _TRAILER)
_FIRST = segment.FILE_HEADER_BYTES
_PADDING = _FIRST + segment.RECORD_HEADER_BYTES + len(RAW[0])  # between the first record and the second


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(_set(_PADDING, b"\x01"), id="padding between records"),
        pytest.param(_set(_TRAILER - 1, b"\x01"), id="padding after the index"),
        pytest.param(_set(40, b"\x01\0\0\0"), id="number of the segment"),
        pytest.param(_set(60, b"\x01"), id="reserved bytes of the file header"),
        pytest.param(_set(_INDEX + 16 + 32, struct.pack("<Q", _FIRST + 64)), id="index: another offset"),
        pytest.param(_set(_INDEX + 16 + 40, struct.pack("<Q", 1 << 62)), id="index: a huge record"),
        pytest.param(_set(_INDEX + 16 + 48, struct.pack("<Q", 6)), id="index: another raw size"),
        pytest.param(_set(_INDEX + 16, digest(b"another")), id="index: another digest"),
        pytest.param(_set(_INDEX + 8, struct.pack("<Q", 2)), id="index: another count"),
        pytest.param(_set(_TRAILER, struct.pack("<Q", 0)), id="trailer: index at 0"),
        pytest.param(_set(_TRAILER, struct.pack("<Q", 1 << 63)), id="trailer: index far outside"),
        pytest.param(_set(_TRAILER + 8, struct.pack("<Q", 1 << 62)), id="trailer: a huge count"),
        pytest.param(_set(_TRAILER + 8, struct.pack("<Q", 0)), id="trailer: no records"),
        pytest.param(_set(_TRAILER + 16, struct.pack("<Q", 1 << 62)), id="trailer: a huge size"),
        pytest.param(_set(_FIRST, bytes(192)), id="a record wiped out"),
    ],
)
def test_lies_under_a_right_digest_are_found(lie: Callable[[bytearray], None]) -> None:
    """The digest at the end only proves that nothing changed since; the check proves that it was a segment."""
    content = bytearray(SMALL)
    lie(content)
    store, reference = _stored(_resealed(content))
    with pytest.raises(IntegrityError) as caught:
        check_segment(store, reference)
    assert caught.value.where == PATH
    assert caught.value.kind != "digest_mismatch"


def test_records_that_the_index_hides_are_found() -> None:
    """A segment whose index leaves out a record holds bytes that nobody described: not a segment."""
    whole = bytearray(build_segment(SNAPSHOT, 0, 0, [_chunk(RAW[0]), _chunk(b"hidden")]))
    position = segment.parse_trailer(whole[-64:], len(whole), PATH).index_offset_bytes
    store, reference = _stored(bytes(whole))
    (first, _) = check_segment(store, reference)
    hidden = bytes(whole[:position]) + segment.pack_tail(position, [first])
    with pytest.raises(IntegrityError):
        check_segment(*_stored(_resealed(hidden + bytes(DIGEST_SIZE_BYTES))))


def test_more_records_than_have_room_are_refused_before_the_index_is_read() -> None:
    """A count of records that cannot lie before the index asks for no memory: the index is never read."""
    line = segment.IndexEntry(digest(b"x"), segment.FILE_HEADER_BYTES, segment.RECORD_HEADER_BYTES, 0, 0)
    head = segment.pack_file_header(SNAPSHOT, 0, 0)
    content = head + segment.pack_tail(len(head), [line] * 200)
    store, reference = _stored(content + bytes(DIGEST_SIZE_BYTES))
    with pytest.raises(IntegrityError, match="200 records do not fit before 64") as caught:
        check_segment(store, reference)
    assert caught.value.kind == "bad_segment"


@pytest.mark.parametrize(("gap_bytes", "says"), [(64, "where no writer puts it"), (4096, "4096 bytes between")])
def test_records_apart_from_each_other_are_found(gap_bytes: int, says: str) -> None:
    """Between records there is only the padding that a writer makes: no room to hide anything, not even zeros."""
    record = _chunk(RAW[0])
    at = segment.FILE_HEADER_BYTES + gap_bytes
    body = segment.pack_file_header(SNAPSHOT, 0, 0) + bytes(gap_bytes) + record.header.pack()
    header = record.header
    line = segment.IndexEntry(header.digest, at, header.record_size_bytes, header.raw_size_bytes, header.codec)
    digested = body
    body += RAW[0]
    tail = segment.pack_tail(len(body), [line])
    store, reference = _stored(body + tail + digest(digested + tail))
    with pytest.raises(IntegrityError, match=says) as caught:
        check_segment(store, reference)
    assert (caught.value.kind, caught.value.where) == ("bad_segment", PATH)


@given(content=st.binary(max_size=6000), at=st.integers(0, len(SMALL)))
def test_garbage_is_never_more_than_an_error(content: bytes, at: int) -> None:
    """Any bytes, alone or written over a segment: the check says no with a typed error, scanning ends."""
    for data in (content, SMALL[:at] + content, _resealed((SMALL[:at] + content + SMALL)[: len(SMALL)])):
        if data == SMALL:
            continue
        store, reference = _stored(data)
        with pytest.raises((IntegrityError, FormatVersionError)):
            check_segment(store, reference)
        assert all(offset < len(data) for _, offset in scan_segment(store, PATH))


# --- one record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(RAW)))
def test_every_flipped_byte_of_a_record_is_found_by_reading(number: int) -> None:
    """Header, plane directory, padding or payload: a read never returns other bytes than the chunk's."""
    raw = RAW[number]
    store, reference = _stored(SMALL)
    entry = check_segment(store, reference)[number]
    location = ChunkLocation(reference, entry.offset_bytes, entry.record_size_bytes, entry.codec)
    assert chunk_reader(store).read_chunk(digest(raw), len(raw), location) == raw
    missed = []
    places = set()
    for at in range(entry.offset_bytes, entry.offset_bytes + entry.record_size_bytes):
        changed = bytearray(SMALL)
        changed[at] ^= 0x04
        damaged, _ = _stored(bytes(changed))
        try:
            found = chunk_reader(damaged).read_chunk(digest(raw), len(raw), location)
        except (IntegrityError, FormatVersionError) as error:
            places.add(error.where)
        else:
            if found != raw:
                missed.append(at)
    assert not missed
    assert places == {PATH}


def test_reader_names_the_segment_of_a_damaged_payload() -> None:
    """A payload that does not decode is bad_payload at its segment, whatever its header promises."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(1000))
    header = RecordHeader(segment.CODEC_PLANES, 1000, len(frame) + 1, digest(bytes(1000)), 1, ((1, len(frame) + 1),))
    content = build_segment(SNAPSHOT, 0, 0, [EncodedChunk(header, (frame + b"\0",))])
    store, reference = _stored(content)
    (entry,) = check_segment(store, reference)
    location = ChunkLocation(reference, entry.offset_bytes, entry.record_size_bytes, entry.codec)
    with pytest.raises(IntegrityError) as caught:
        chunk_reader(store).read_chunk(digest(bytes(1000)), 1000, location)
    assert (caught.value.kind, caught.value.where) == ("bad_payload", PATH)


# --- payloads ---------------------------------------------------------------------------------------------------------

SIZE = 4000
_COMPRESSOR = zstandard.ZstdCompressor(level=1)
GOOD = _COMPRESSOR.compress(bytes(SIZE))
_MAGIC = b"\x28\xb5\x2f\xfd"
_CLAIM_OF_8_BYTES = b"\xe0"  # frame header descriptor: single segment, content size in 8 bytes


def _without_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(data)


FRAMES = {
    "empty": b"",
    "magic alone": _MAGIC,
    "garbage": bytes(range(200)),
    "content one byte shorter": _COMPRESSOR.compress(bytes(SIZE - 1)),
    "content one byte longer": _COMPRESSOR.compress(bytes(SIZE + 1)),
    "content a thousand times longer": _COMPRESSOR.compress(bytes(SIZE * 1000)),
    "claims 2^62 bytes": _MAGIC + _CLAIM_OF_8_BYTES + struct.pack("<Q", 1 << 62) + GOOD[6:],
    "claims the right size over another content": _MAGIC
    + _CLAIM_OF_8_BYTES
    + struct.pack("<Q", SIZE)
    + b"\x19\0\0"
    + b"abc",
    "content size not said": _without_size(bytes(SIZE)),
    "trailing byte": GOOD + b"\0",
    "truncated": GOOD[:-1],
    "two frames": GOOD + GOOD,
    "two frames that together are right": _COMPRESSOR.compress(bytes(SIZE // 2)) * 2,
    "skippable frame": b"\x50\x2a\x4d\x18" + struct.pack("<I", 8) + bytes(8),
    "skippable frame first": b"\x50\x2a\x4d\x18" + struct.pack("<I", 0) + GOOD,
    "skippable frame last": GOOD + b"\x50\x2a\x4d\x18" + struct.pack("<I", 0),
    "format of zstd 0.7": b"\x27\xb5\x2f\xfd" + GOOD[4:],
}


@pytest.mark.parametrize("core", CORES)
def test_good_frame_decodes(core: ModuleType | None) -> None:
    """The table of bad frames would prove nothing if the good one were refused."""
    out = bytearray(b"x" * SIZE)
    planes.decode(((PLANE_ZSTD, len(GOOD)),), GOOD, memoryview(out), core)
    assert out == bytes(SIZE)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("item_size", [1, 2])
@pytest.mark.parametrize("name", FRAMES)
def test_bad_frames_are_refused(core: ModuleType | None, item_size: int, name: str) -> None:
    """Anything but one whole frame of exactly the plane's length is a ValueError, in either implementation."""
    frame = FRAMES[name]
    directory = ((PLANE_RAW, SIZE),) * (item_size - 1) + ((PLANE_ZSTD, len(frame)),)
    payload = bytes(SIZE) * (item_size - 1) + frame
    with pytest.raises(ValueError, match="zstd plane"):
        planes.decode(directory, payload, memoryview(bytearray(SIZE * item_size)), core)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "directory",
    [
        ((PLANE_RAW, 10), (PLANE_RAW, 10)),
        ((PLANE_RAW, 9), (PLANE_RAW, 10)),
        ((PLANE_RAW, 12), (PLANE_RAW, 8)),
        ((PLANE_RAW, 10), (2, 10)),
        ((PLANE_RAW, 1 << 62), (PLANE_RAW, 10)),
    ],
)
def test_directories_that_do_not_fit_are_refused(
    core: ModuleType | None, directory: tuple[tuple[int, int], ...]
) -> None:
    """Planes that are too long, too short or of unknown method, for a payload of 20 bytes and 22 to fill."""
    with pytest.raises(ValueError, match=r"plane"):
        planes.decode(directory, bytes(20), memoryview(bytearray(22)), core)


@pytest.mark.parametrize("core", CORES)
@given(data=st.data())
def test_damaged_frames_never_do_harm(core: ModuleType | None, data: st.DataObject) -> None:
    """A frame with any bytes changed decodes to some bytes of the right length, or is refused."""
    frame = bytearray(_COMPRESSOR.compress(bytes(range(256)) * 8))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    around = bytearray(b"#" * 4096)
    with suppress(ValueError):
        planes.decode(((PLANE_ZSTD, len(frame)),), frame, memoryview(around)[1024 : 1024 + 2048], core)
    assert around[:1024] == around[-1024:] == b"#" * 1024


def test_decoder_checks_lengths_and_names_the_chunk() -> None:
    """Lengths other than the header's are bad_payload for every codec; the error names the chunk."""
    raw = b"0123456789"
    chunk = RawCodec().encode(memoryview(raw), digest(raw), 1)
    for payload, size in ((raw[:-1], 10), (raw, 9), (raw, 11)):
        with pytest.raises(IntegrityError) as caught:
            decode(chunk.header, payload, memoryview(bytearray(size)))
        assert (caught.value.kind, caught.value.where) == ("bad_payload", digest(raw).hex())
        assert isinstance(caught.value, CiuicError)


# --- deltas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_size", [1, 2, 4, 16])
def test_every_flipped_byte_of_a_delta_payload_is_found(item_size: int) -> None:
    """A damaged payload of a delta is refused or decodes to bytes of another digest; the base is left alone."""
    chunk = _delta(item_size)
    payload = b"".join(chunk.payload)
    base = bytearray(OLD)
    out = bytearray(len(NEW))
    decode(chunk.header, payload, memoryview(out), memoryview(base))
    assert out == NEW
    for at in range(len(payload)):
        damaged = bytearray(payload)
        damaged[at] ^= 0x04
        out = bytearray(len(NEW))
        with suppress(IntegrityError):
            decode(chunk.header, damaged, memoryview(out), memoryview(base))
        assert digest(out) != chunk.header.digest
    assert base == OLD


def test_a_wrong_base_gives_another_digest() -> None:
    """A base of the right length that is not the one meant decodes to bytes that the caller's digest check refuses."""
    chunk = _delta(4)
    for at in range(0, len(OLD), 7):
        wrong = bytearray(OLD)
        wrong[at] ^= 1
        out = bytearray(len(NEW))
        decode(chunk.header, b"".join(chunk.payload), memoryview(out), memoryview(wrong))
        assert digest(out) != chunk.header.digest


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("how", [transform.XOR, transform.DIFFERENCE, transform.ROTATED])
@pytest.mark.parametrize("name", FRAMES)
def test_bad_frames_of_transformed_planes_are_refused(core: ModuleType | None, how: int, name: str) -> None:
    """The table of bad frames holds for deltas and rotated planes too."""
    frame = FRAMES[name]
    directory = ((PLANE_RAW, SIZE), (PLANE_ZSTD, len(frame)))
    base = None if how == transform.ROTATED else memoryview(bytes(2 * SIZE))
    with pytest.raises(ValueError, match="zstd plane"):
        planes.decode(directory, bytes(SIZE) + frame, memoryview(bytearray(2 * SIZE)), core, how, base)
